"""p-MoD vision-language models on transformers.

Names are imported on first use, so that `pmod --help` does not wait for torch and transformers. The
classes of p-MoD LLaVA are known to the Auto classes of transformers once `load_pretrained` or the
class itself was imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmod_model.configuration import PModConfig
    from pmod_model.context import RoutingRecord
    from pmod_model.inject import inject_pmod, record_routing
    from pmod_model.llava import PModLlavaConfig, PModLlavaForConditionalGeneration
    from pmod_model.llava_next import PModLlavaNextConfig, PModLlavaNextForConditionalGeneration
    from pmod_model.loading import load_pretrained

_HOME = {
    "PModConfig": "configuration",
    "PModLlavaConfig": "llava",
    "PModLlavaForConditionalGeneration": "llava",
    "PModLlavaNextConfig": "llava_next",
    "PModLlavaNextForConditionalGeneration": "llava_next",
    "RoutingRecord": "context",
    "inject_pmod": "inject",
    "load_pretrained": "loading",
    "record_routing": "inject",
}

__all__ = [
    "PModConfig",
    "PModLlavaConfig",
    "PModLlavaForConditionalGeneration",
    "PModLlavaNextConfig",
    "PModLlavaNextForConditionalGeneration",
    "RoutingRecord",
    "inject_pmod",
    "load_pretrained",
    "record_routing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
