"""The ops as Triton kernels: for GPUs that the compiled CUDA library does not serve.

`OPS` maps the name of every raw op that has kernels to its implementation. Importing this imports
triton, so it is left to the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pmod_ops._triton import (
    gather,
    gather_add_rmsnorm,
    gather_rmsnorm,
    route,
    route_gather,
    weighted_scatter_add,
)

MODULES = (
    gather,
    gather_rmsnorm,
    gather_add_rmsnorm,
    route,
    route_gather,
    weighted_scatter_add,
)

OPS: dict[str, Callable[..., Any]] = {
    name: op for module in MODULES for name, op in module.OPS.items()
}
