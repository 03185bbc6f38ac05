"""Load any model that p-MoD was injected into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.inject import inject_pmod
from pmod_model.llava import PModLlavaForConditionalGeneration
from pmod_model.llava_next import PModLlavaNextForConditionalGeneration

OWN_CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls
    for cls in (PModLlavaForConditionalGeneration, PModLlavaNextForConditionalGeneration)
}
SHOWN = 20
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


def load_pretrained(
    path: str | Path, *, pmod: PModConfig | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a p-MoD model saved with `save_pretrained`, whatever its backbone.

    Args:
        path: folder (or hub name) of the checkpoint. `config.pmod` says what to inject.
        pmod: settings for a checkpoint of the backbone, which has none; its routers are then zero.
        kwargs: for `from_pretrained` (dtype, device_map, ...).

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the checkpoint has no p-MoD settings or two of them, its class is unknown, a
            model of images is to be split into pipeline stages, or parameters are missing or
            surplus; the message lists them.
    """
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **hub)
    saved: Any = getattr(config, "pmod", None)
    if (saved is None) == (pmod is None):
        expected, because = (
            ("a PModConfig", "has no p-MoD settings") if pmod is None else ("None", "has its own")
        )
        raise ValueError(
            f"load_pretrained: pmod: expected {expected}, because {path} {because}, got {pmod}"
        )
    stages = getattr(kwargs.get("distributed_config"), "pp_size", None) or 1
    if stages > 1 and config.get_text_config() is not config:
        raise ValueError(
            "load_pretrained: distributed_config: expected pp_size 1 for a vision-language model,"
            f" whose decoder transformers does not split, got {stages}"
        )
    settings = pmod or PModConfig.from_dict(saved)
    model_class: Any = _model_class(path, config)
    if model_class in OWN_CLASSES.values():
        loader = model_class
    else:
        loader = _injecting(model_class, settings)
    model, info = loader.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    missing, surplus = set(info["missing_keys"]), set(info["unexpected_keys"])
    if saved is None:
        missing = {key for key in missing if ".mod_router." not in key}
    if missing or surplus:
        raise ValueError(
            f"load_pretrained: {path}: expected parameters of {model_class.__name__} and routers,"
            f" got {_listed(missing, 'missing')}, {_listed(surplus, 'unexpected')}"
        )
    return model


def _model_class(path: str | Path, config: Any) -> type[PreTrainedModel]:
    names: Sequence[str] = config.architectures or ()
    cls = OWN_CLASSES.get(names[0]) or getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(
            f"load_pretrained: {path}: expected a class of transformers in config.architectures,"
            f" got {list(names)}"
        )
    return cls


def _injecting(cls: Any, settings: PModConfig) -> Any:
    """`cls`, whose instances are injected as soon as they are built and then are of `cls` again."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        self.__class__ = cls
        inject_pmod(self, settings)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _listed(keys: set[str], what: str) -> str:
    shown = sorted(keys)[:SHOWN]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {what}{': ' if keys else ''}{', '.join(shown)}{more}"
