"""Argument checks shared by every op: one form of message, raised before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmod_ops.routing import Routing

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: Any) -> NoReturn:
    """Raise the ValueError of `op`: which argument, what it should be, what it is."""
    raise ValueError(f"pmod_ops.{op}: {argument}: expected {expected}, got {got}")


def name(dtype: torch.dtype) -> str:
    """`bfloat16` rather than `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits, gates and sums: float64 for float64 rows, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(
    op: str,
    argument: str,
    tensor: Any,
    *,
    dims: tuple[int, ...] | None = None,
    shape: Sequence[int] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """Check type, layout, dtype, dimensions or exact shape, and device of one argument."""
    if not isinstance(tensor, Tensor):
        got = type(tensor).__name__
        raise TypeError(f"pmod_ops.{op}: {argument}: expected a tensor, got {got}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        fail(op, argument, "a dense tensor", f"layout {tensor.layout}")
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = " or ".join(name(d) for d in dtypes)
        raise TypeError(
            f"pmod_ops.{op}: {argument}: expected dtype {wanted}, got {name(tensor.dtype)}"
        )
    if dims is not None and tensor.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        fail(op, argument, f"{wanted} dimensions", f"shape {list(tensor.shape)}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        fail(op, argument, f"shape {list(shape)}", list(tensor.shape))
    if like is not None and tensor.device != like.device:
        fail(op, argument, f"device {like.device}", tensor.device)


def check_rows(op: str, argument: str, x: Any) -> None:
    """Rows [N, D] or [B, S, D] of a supported dtype, D >= 1."""
    check_tensor(op, argument, x, dims=(2, 3), dtypes=ROW_DTYPES)
    if x.shape[-1] < 1:
        fail(op, argument, "a last dimension >= 1", list(x.shape))


def check_vector(op: str, argument: str, weight: Any, x: Tensor) -> Tensor:
    """A weight [D] or [1, D] in the dtype of `x` or float32; returned as [D]."""
    hidden = x.shape[-1]
    dtypes = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    check_tensor(op, argument, weight, dims=(1, 2), dtypes=dtypes, like=x)
    if tuple(weight.shape) not in ((hidden,), (1, hidden)):
        fail(op, argument, f"shape [{hidden}]", list(weight.shape))
    return weight if weight.dim() == 1 else weight.reshape(hidden)


def check_bias(op: str, argument: str, bias: Any, x: Tensor) -> Tensor | None:
    """A scalar, a tensor with one element, or None; returned as a tensor [1] or None."""
    if bias is None:
        return None
    if isinstance(bias, float | int):
        return torch.full((1,), float(bias), dtype=acc_dtype(x.dtype), device=x.device)
    dtypes = (x.dtype, torch.float32) if x.dtype != torch.float64 else (x.dtype,)
    check_tensor(op, argument, bias, dims=(0, 1), dtypes=dtypes, like=x)
    if bias.numel() != 1:
        fail(op, argument, "one element", f"shape {list(bias.shape)}")
    return bias if bias.dim() == 1 else bias.reshape(1)


def check_eps(op: str, eps: Any) -> None:
    """A finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"pmod_ops.{op}: eps: expected a number >= 0, got {eps!r}")
    if not (math.isfinite(eps) and eps >= 0):
        fail(op, "eps", "a finite number >= 0", eps)


def check_routing(op: str, routing: Any, x: Tensor) -> None:
    """A Routing made for as many rows as `x` has, on its device."""
    if not isinstance(routing, Routing):
        got = type(routing).__name__
        raise TypeError(f"pmod_ops.{op}: routing: expected a Routing, got {got}")
    rows = x.numel() // x.shape[-1]
    if routing.inverse.shape[0] != rows:
        fail(
            op, "routing", f"one made for the {rows} rows of x", f"{routing.inverse.shape[0]} rows"
        )
    if routing.inverse.device != x.device:
        fail(op, "routing", f"device {x.device} like x", routing.inverse.device)


def check_slots(op: str, argument: str, rows: Any, routing: Routing, x: Tensor) -> Tensor:
    """Rows of the routing's layout in the dtype of `x`; returned as [slots, D].

    Under autocast a matrix product may come in a lower precision than the residual stream; it is
    converted, as the addition of the two would.
    """
    hidden = x.shape[-1]
    shape: tuple[int, ...] = (routing.index.shape[0], hidden)
    if routing.layout == "padded":
        shape = (routing.num_sequences, routing.max_kept, hidden)
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and isinstance(rows, Tensor) and rows.is_floating_point():
        rows = rows.to(x.dtype)
    check_tensor(op, argument, rows, dims=(2, 3), dtypes=(x.dtype,), like=x)
    shapes = [shape]
    if routing.num_sequences == 1:  # both layouts are the same memory
        slots = routing.index.shape[0]
        shapes = [(slots, hidden), (1, slots, hidden)]
    if tuple(rows.shape) not in shapes:
        fail(op, argument, f"shape {list(shape)}", list(rows.shape))
    return rows if rows.dim() == 2 else rows.reshape(-1, hidden)
