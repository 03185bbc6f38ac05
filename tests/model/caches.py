"""The cache of a model under the name that the installed transformers gives it."""

from typing import Any

from transformers import LlamaForCausalLM

from pmod_model.cache_name import cache_name

CACHE = cache_name(LlamaForCausalLM)


def cache_of(output: Any) -> Any:
    """The cache in what `forward` or `generate` returned."""
    return output[CACHE]
