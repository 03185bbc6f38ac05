"""Whether two candidates computed the same: rows of indices exactly, values within rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of a row's norm. The widest in bfloat16: the derivative 1 - t^2 of a tanh that was rounded, off
# by 2^-9 * 2 t^2 / (1 - t^2) < 2^-6 for the scores that `Problem` makes, and rounded again.
TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 2**-14}
SAMPLED = 4096  # rows compared, of tensors that have more


def assert_agree(out: Any, expected: Any, who: str) -> None:
    """Raise unless `who` returned what ours did: the same kept rows, and values close by."""
    ours, theirs = tensors(expected), tensors(out)
    assert len(ours) == len(theirs), f"{who}: {len(theirs)} results, not {len(ours)}"
    for place, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if b.numel() == 1:
            continue  # the bias's gradient, which cancels; the weight's sums the same terms
        if b.is_floating_point():
            error = row_error(a, b)
            allowed = max(TOLERANCE[a.dtype], TOLERANCE[b.dtype])
            assert error <= allowed, f"{who}: result {place} is off by {error:.2e} of a row"
        else:
            assert torch.equal(indices(a), indices(b)), f"{who} keeps other rows"


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a candidate's result."""
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


def indices(kept: Tensor) -> Tensor:
    """Kept rows, from themselves or from a mask."""
    return kept.flatten().nonzero()[:, 0] if kept.dtype == torch.bool else kept.long()


def row_error(a: Tensor, b: Tensor) -> float:
    """The largest error of a row, relative to its norm; of one-dimensional tensors, of all."""
    a, b = (t.detach().reshape(-1, t.shape[-1]) for t in (a, b))
    step = max(1, len(b) // SAMPLED)
    a, b = a[::step].float(), b[::step].float()
    norm = b.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((a - b).norm(dim=1) / norm).max()) if b.numel() else 0.0
