"""The argument that holds the key-value cache: transformers 5.24 renamed it to `cache`.

Its older name still works there and makes the backbone warn. So p-MoD hands on the arguments that
it gets as they are, and needs to know the name only to read them or to add a cache of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin

OLD_NAME, NEW_NAME = "past_key_values", "cache"


def cache_name(module: nn.Module | type[nn.Module]) -> str:
    """The cache among the arguments of `forward`, which is also its name in the output.

    The signature decides, not the version: code from a model's repository may keep the old name.
    """
    names = inspect.signature(module.forward).parameters
    if OLD_NAME not in names and NEW_NAME not in names:
        # a forward that only hands on keyword arguments gets those of `generate`
        mixin: Any = GenerationMixin
        names = inspect.signature(mixin.prepare_inputs_for_generation).parameters
    return OLD_NAME if OLD_NAME in names else NEW_NAME


def find_cache(inputs: Mapping[str, Any], name: str) -> Any:
    """The cache among the arguments of a module whose `cache_name` is `name`, or None."""
    # a cache under the new name means nothing to a module that knows the old one only
    return inputs.get(name, inputs.get(OLD_NAME))
