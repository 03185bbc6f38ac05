"""What launchers share: checked arguments, the device they run on, block sizes, partial sums.

Messages name the op, the argument, what was expected and what came, before anything is written.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pmod_ops._checks import check_tensor, fail, name

MAX_HIDDEN = 16384  # longer rows do not fit into the shared memory that some GPUs have
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LaunchConfig(NamedTuple):
    """Columns of a program, a power of two, and warps that share them."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the launch."""
        return options(self.num_warps)


def options(num_warps: int) -> dict[str, Any]:
    """Of a launch. No fused products and sums: the same bits from every kernel that sums a row.

    Left alone, triton's own choice changes with its release.
    """
    return {"num_warps": num_warps, "enable_fp_fusion": False}


def row_config(hidden: int, elements: int = 16) -> LaunchConfig:
    """For one row per program, of which a thread has about so many elements.

    16 warps at most: 1024 threads where a warp has 64 lanes.
    """
    block = triton.next_power_of_2(hidden)
    return LaunchConfig(block, min(max(block // (32 * elements), 1), 16))


def parameter_partials(rows: int) -> int:
    """How many programs share the rows that a parameter's gradient is summed over.

    Of the rows alone, so that sums have the same bits on every device: 4 rows each, whose partial
    sum costs little beside them, and no more programs than large devices run at once.
    """
    return min((rows + 3) // 4, 256)


def is_served(x: Tensor) -> bool:
    """Whether kernels can read x: on a GPU, or interpreted."""
    return x.is_cuda or triton.knobs.runtime.interpret


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, where launches go."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_rows(
    op: str,
    argument: str,
    t: Tensor,
    *,
    like: Tensor | None = None,
    count: int | None = None,
    hidden: int | None = None,
) -> Tensor:
    """A contiguous matrix of rows: of the dtype, the device and, unless given, width of `like`."""
    dtype = t.dtype if like is None else like.dtype
    if dtype not in ROW_DTYPES:
        raise TypeError(
            f"pmod_ops.{op}: {argument}: expected float32, bfloat16 or float16 on a GPU, got"
            f" {name(dtype)}; float64 rows are for the CPU"
        )
    if like is None and not is_served(t):
        fail(op, argument, "a CUDA tensor", f"device {t.device}")
    check_tensor(op, argument, t, dims=(2,), dtypes=(dtype,), like=like)
    if hidden is None and like is not None:
        hidden = like.shape[1]
    if count is not None and t.shape[0] != count:
        fail(op, argument, f"{count} rows", t.shape[0])
    if hidden is not None and t.shape[1] != hidden:
        fail(op, argument, f"{hidden} columns", t.shape[1])
    if not 1 <= t.shape[1] <= MAX_HIDDEN:
        fail(op, argument, f"1 to {MAX_HIDDEN} columns", t.shape[1])
    return t.contiguous()


def check_optional_rows(
    op: str, argument: str, t: Tensor | None, *, like: Tensor, count: int | None = None
) -> Tensor | None:
    """`check_rows` of what may be absent."""
    return None if t is None else check_rows(op, argument, t, like=like, count=count)


def check_mutable(op: str, argument: str, t: Tensor, *, like: Tensor | None = None) -> Tensor:
    """Rows that are written in place, so that a copy would not do; shaped like `like`."""
    count = None if like is None else like.shape[0]
    if check_rows(op, argument, t, like=like, count=count) is not t:
        fail(op, argument, "a contiguous tensor, because it is written in place", t.stride())
    return t


def check_numbers(
    op: str, argument: str, t: Tensor, dtype: torch.dtype, size: int | None, *, like: Tensor
) -> Tensor:
    """A contiguous vector of `size` numbers (None: any) on the device of `like`."""
    shape = None if size is None else (size,)
    check_tensor(op, argument, t, dims=(1,), shape=shape, dtypes=(dtype,), like=like)
    return t.contiguous()


def check_optional_numbers(
    op: str, argument: str, t: Tensor | None, dtype: torch.dtype, size: int | None, *, like: Tensor
) -> Tensor | None:
    """`check_numbers` of what may be absent."""
    return None if t is None else check_numbers(op, argument, t, dtype, size, like=like)


def check_weight(op: str, argument: str, t: Tensor, size: int, *, like: Tensor) -> Tensor:
    """A contiguous parameter of `size` entries, in the dtype of the rows `like` or float32."""
    dtypes = (like.dtype,) if like.dtype == torch.float32 else (like.dtype, torch.float32)
    check_tensor(op, argument, t, dims=(1,), shape=(size,), dtypes=dtypes, like=like)
    return t.contiguous()


def check_optional_weight(
    op: str, argument: str, t: Tensor | None, size: int, *, like: Tensor
) -> Tensor | None:
    """`check_weight` of what may be absent."""
    return None if t is None else check_weight(op, argument, t, size, like=like)


def check_maps(
    op: str,
    gate: Tensor,
    inverse: Tensor,
    index: Tensor,
    kind: Tensor,
    slots: int,
    *,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a routing says of the rows `like`, and of so many slots."""
    rows = like.shape[0]
    return (
        check_numbers(op, "gate", gate, torch.float32, rows, like=like),
        check_numbers(op, "inverse", inverse, torch.int32, rows, like=like),
        check_numbers(op, "index", index, torch.int32, slots, like=like),
        check_numbers(op, "kind", kind, torch.uint8, rows, like=like),
    )


def check_activation(op: str, activation: int) -> None:
    """One of pmod_ops.route.ACTIVATIONS."""
    if not 0 <= activation < 4:
        fail(op, "activation", "0..3", activation)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Not initialised, on the device of `like`; in its dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def numbers(like: Tensor, *shape: int) -> Tensor:
    """Float32, not initialised, on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
