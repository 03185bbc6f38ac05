"""Loads the compiled kernels, defines ops, and gives every op its autograd: nothing else.

Each op has one schema (`define`), one fake (`fake`) and one pair of autograd functions
(`autograd`). The pair serves twice: for the plain op, and for the chained form that also returns x.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIB = torch.library.Library("pmod", "DEF")
_LIB.define("build_info() -> str", tags=(torch.Tag.pt2_compliant_tag,))


def define(schema: str) -> None:
    """Declare an op of the namespace `pmod`."""
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake (shapes only) implementation of `op`."""
    return torch.library.register_fake(f"pmod::{op}", lib=_LIB)


def autograd(
    op: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register first-order gradients of `op`; return its chained form.

    The chained form takes x of any leading shape as first argument, and returns the outputs of the
    op and x, for the next reader. x then has one gradient buffer, which each backward op down the
    chain updates in place, where plain autograd would add up one dense gradient per reader.

    `backward(ctx, *grads, grad_x=None)` receives the gradient of the returned x as `grad_x`.
    """

    def first_order(ctx: Any, *grads: Any) -> Any:
        refuse_double_backward(op)
        return backward(ctx, *grads)

    def setup_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    torch.library.register_autograd(f"pmod::{op}", first_order, setup_context=setup_op, lib=_LIB)
    call = getattr(torch.ops.pmod, op)

    class Chain(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *args: Any) -> Any:
            out = call(flat(x), *args)
            return (*(out if isinstance(out, tuple) else (out,)), x.view_as(x))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_op(ctx, inputs, output[:-1] if len(output) > 2 else output[0])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            refuse_double_backward(op)
            return backward(ctx, *grads[:-1], grad_x=grads[-1])

    Chain.__name__ = f"{op}_chain"
    return Chain.apply


def refuse_double_backward(op: str) -> None:
    """The backward ops have no gradient of their own; say so instead of returning a wrong one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"pmod_ops.{op}: only first-order gradients are implemented")


def flat(x: Tensor) -> Tensor:
    """[B, S, D] seen as [N, D]."""
    return x.reshape(-1, x.shape[-1])


class GradientBuffer:
    """The gradient of x on its way down a chain of readers."""

    def __init__(self, grad_x: Tensor | None, x: Tensor) -> None:
        # Only a buffer that one of our backward ops made is known to have no other owner.
        self.accumulate = grad_x is not None
        if grad_x is None:
            grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        elif not (getattr(grad_x, "_pmod_owned", False) and grad_x.is_contiguous()):
            grad_x = grad_x.clone(memory_format=torch.contiguous_format)
        self.tensor = grad_x
        self.rows = grad_x.view(-1, x.shape[-1])

    def release(self) -> Tensor:
        """Hand the buffer to the previous reader of the chain."""
        return own(self.tensor)


def own(grad_x: Tensor) -> Tensor:
    """Mark a freshly made gradient of x as free to be updated in place by the next backward op."""
    if not torch.compiler.is_compiling():
        grad_x._pmod_owned = True  # pyright: ignore[reportAttributeAccessIssue]
    return grad_x


def load_kernels() -> None:
    """Import the compiled library, whose static initialisers register the CPU kernels."""
    try:
        importlib.import_module("pmod_ops._C")
    except ImportError as error:
        raise ImportError(
            f"pmod_ops: the compiled kernels cannot be loaded with torch {torch.__version__} "
            f"({error}); rebuild them with `pip install --force-reinstall --no-deps .` in the "
            "source folder"
        ) from error


def backend_info() -> dict[str, Any]:
    """What was compiled, and which implementation serves each device.

    Returns:
        A dictionary with `build` (compiler, instruction sets, CUDA architectures), `torch` and, for
        each device, the implementation that serves it and why.
    """
    build = json.loads(torch.ops.pmod.build_info())
    return {
        "torch": torch.__version__,
        "build": build,
        "devices": {
            "cpu": "C++ (pmod_ops._C)",
            "cuda": "none: this build has CPU kernels only",
        },
    }
