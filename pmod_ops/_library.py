"""Loads the compiled kernels, defines ops, and gives every op its autograd: nothing else.

Each op has one schema (`define`), one fake (`fake`) and one pair of autograd functions
(`autograd`). The pair serves twice: for the plain op, and for the chained form that also returns x.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIB = torch.library.Library("pmod", "DEF")
_LIB.define("build_info() -> str", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("cuda_info() -> str", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("cuda_error(int status) -> str", tags=(torch.Tag.pt2_compliant_tag,))
_ops: list[str] = []  # all that were declared
_cuda_problem: str | None = None  # why the compiled CUDA kernels do not serve
_serves_triton = False  # CUDA tensors


def define(schema: str) -> None:
    """Declare an op of the namespace `pmod`."""
    _ops.append(schema.partition("(")[0])
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake (shapes only) implementation of `op`."""
    return torch.library.register_fake(f"pmod::{op}", lib=_LIB)


def inference(op: str) -> Callable[..., Any]:
    """`op` for calls that record no gradient.

    The kernel that `autograd` registers is Python, and takes longer than the op itself does for
    short rows, so it is passed over.
    """
    overload = getattr(torch.ops.pmod, op).default

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return call


def autograd(
    op: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Register the first-order gradients of `op`."""

    def first_order(ctx: Any, *grads: Any) -> Any:
        refuse_double_backward(op)
        return backward(ctx, *grads)

    def setup_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    torch.library.register_autograd(f"pmod::{op}", first_order, setup_context=setup_op, lib=_LIB)


def chain(
    op: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """The form of `op` that also returns x, for the next reader.

    It takes x of any leading shape first, and returns the outputs of the op and x. x then has one
    gradient buffer, which each backward op down the chain updates in place, where plain autograd
    would add up one dense gradient per reader. `backward(ctx, *grads, grad_x=None)` receives the
    gradient of the returned x as `grad_x`.
    """
    call = getattr(torch.ops.pmod, op)

    class Chain(torch.autograd.Function):
        updates_buffer = True

        @staticmethod
        def forward(x: Tensor, *args: Any) -> Any:
            out = call(flat(x), *args)
            return (*(out if isinstance(out, tuple) else (out,)), x.view_as(x))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.feeds = receiver(inputs[0])
            setup(ctx, inputs, output[:-1] if len(output) > 2 else output[0])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            refuse_double_backward(op)
            return backward(ctx, *grads[:-1], grad_x=grads[-1])

    Chain.__name__ = f"{op}_chain"

    def apply(x: Tensor, *args: Any) -> Any:
        *outputs, passed = Chain.apply(x, *args)
        return (*outputs, same_chain(passed, x))

    return apply


def receiver(x: Tensor) -> Any:
    """The node that the gradient of x goes to, if it is one that updates it in place, else None.

    Any other node would be kept alive, with its graph, by the gradient that carries it as a mark.
    """
    if torch.compiler.is_compiling():
        return None
    function = getattr(x.grad_fn, "_forward_cls", None)
    return x.grad_fn if getattr(function, "updates_buffer", False) else None


def same_chain(passed: Tensor, x: Tensor) -> Tensor:
    """`passed`, known as the x of the chain that x belongs to."""
    mark = chain_mark(x)
    if mark is not None:
        passed._pmod_chain = mark  # pyright: ignore[reportAttributeAccessIssue]
    return passed


def start_chain(x: Tensor) -> object:
    """Mark a returned x, so that it is recognised when it comes back unchanged."""
    mark = object()
    if not torch.compiler.is_compiling():
        x._pmod_chain = mark  # pyright: ignore[reportAttributeAccessIssue]
    return mark


def chain_mark(x: Tensor) -> object | None:
    """The mark of x; None if x is not what an op returned, and under compile."""
    return None if torch.compiler.is_compiling() else getattr(x, "_pmod_chain", None)


def refuse_double_backward(op: str) -> None:
    """The backward ops have no gradient of their own; say so instead of returning a wrong one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"pmod_ops.{op}: only first-order gradients are implemented")


def flat(x: Tensor) -> Tensor:
    """[B, S, D] seen as [N, D]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class GradientBuffer:
    """The gradient of x on its way down a chain of readers.

    A buffer is updated in place only if the backward op of the next reader made it for the node at
    hand and autograd holds it nowhere else; a gradient that came another way, or that the caller
    asked for too, is copied first.
    """

    def __init__(self, grad_x: Tensor | None, x: Tensor, ctx: Any) -> None:
        self.accumulate = grad_x is not None
        self.feeds = getattr(ctx, "feeds", None)
        if grad_x is None:
            grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        elif not is_ours(grad_x, ctx):
            grad_x = grad_x.clone(memory_format=torch.contiguous_format)
        self.tensor = grad_x
        self.rows = grad_x.view(-1, x.shape[-1])

    def release(self) -> Tensor:
        """Hand the buffer to the previous reader of the chain."""
        return hand_over(self.tensor, self.feeds)


def is_ours(grad_x: Tensor, ctx: Any) -> bool:
    """Whether `grad_x` was made for `ctx` by a backward op and has no other holder."""
    if torch.compiler.is_compiling() or getattr(grad_x, "_pmod_for", None) is not ctx:
        return False
    count = getattr(grad_x, "_use_count", None)  # private: a torch without it gets a copy
    return count is not None and count() == 1 and grad_x.is_contiguous()


def hand_over(grad_x: Tensor, node: Any) -> Tensor:
    """`grad_x`, free to be updated in place by the backward of `node` and by nobody else."""
    if not torch.compiler.is_compiling():
        grad_x._pmod_for = node  # pyright: ignore[reportAttributeAccessIssue]
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
    try:
        torch.ops.pmod.build_info()
    except RuntimeError as error:  # the environment asks for an instruction set that is not there
        raise ImportError(str(error)) from None
    _load_cuda_kernels()


def _load_cuda_kernels() -> None:
    """Choose who serves CUDA tensors; without anybody the CPU ops still work.

    PMOD_CUDA_IMPL: "cuda", the compiled library; "triton"; unset, the first of them that is there.
    """
    global _cuda_problem, _serves_triton
    asked = os.environ.get("PMOD_CUDA_IMPL", "")
    if asked not in ("", "cuda", "triton"):
        raise ImportError(
            f"pmod_ops: PMOD_CUDA_IMPL: expected 'cuda', 'triton' or nothing, got {asked!r}"
        )
    _cuda_problem = "PMOD_CUDA_IMPL=triton" if asked == "triton" else _import_cuda_kernels()
    if _cuda_problem is None:
        return
    if asked == "cuda":
        raise ImportError(f"pmod_ops: PMOD_CUDA_IMPL=cuda, but {_cuda_problem}")
    _serves_triton = importlib.util.find_spec("triton") is not None
    if asked == "triton" and not _serves_triton:
        raise ImportError(
            "pmod_ops: PMOD_CUDA_IMPL=triton, but triton is not installed: pip install triton"
        )
    for op in _ops:
        kernel = _call_triton(op) if _serves_triton else _refuse_cuda(op, _cuda_problem)
        _LIB.impl(op, kernel, "CUDA")


def _import_cuda_kernels() -> str | None:
    """Import the compiled CUDA library; says why if that is not possible."""
    try:
        if importlib.util.find_spec("pmod_ops._C_cuda") is None:
            return "this build has no CUDA kernels; install it where there is an nvcc"
        importlib.import_module("pmod_ops._C_cuda")
    except ImportError as error:
        return f"the CUDA kernels cannot be loaded: {error}"
    return None


def _call_triton(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from pmod_ops._triton import OPS  # at the first call: it imports triton

        return OPS[op](*args)

    return call


def _refuse_cuda(op: str, problem: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"pmod_ops.{op}: got CUDA tensors, but {problem}")

    return refuse


def backend_info() -> dict[str, Any]:
    """What was compiled, and which implementation serves each device.

    Returns:
        A dictionary with `build` (compiler, the instruction sets that were compiled and that this
        CPU has, the active one, CUDA architectures), `torch` and, for each device, what serves it
        and why.
    """
    build = json.loads(torch.ops.pmod.build_info())
    if _cuda_problem is None:
        build["cuda"] = json.loads(torch.ops.pmod.cuda_info())
        served, problem = "CUDA C++ (pmod_ops._C_cuda)", build["cuda"]["problem"]
    else:
        served = "Triton (pmod_ops._triton)" if _serves_triton else "none"
        build["cuda"], problem = None, _cuda_problem
    return {
        "torch": torch.__version__,
        "build": build,
        "devices": {
            "cpu": f"C++ (pmod_ops._C), {build['active_isa']}",
            "cuda": served if problem is None else f"{served}; {problem}",
        },
    }
