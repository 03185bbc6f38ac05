"""One table of samples for tests and benchmarks, and the measure of error they share.

A sample describes a batch by its sequences: each is a string of segments, `t` text, `v` vision,
    `|` a
new pool, `.` padding, e.g. "t4 v16 t2 ..." is four text rows, sixteen vision rows and two text
rows, then three of padding.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmod_ops import reference
from pmod_ops._checks import acc_dtype
from pmod_ops.plan import ALWAYS, PADDING, ROUTABLE, RoutingPlan
from pmod_ops.routing import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYER = 3


@dataclass(frozen=True)
class Sample:
    """One row of the table.

    Attributes:
        name: test id.
        sequences: see the module; all of one length are a padded batch, else a packed one.
        ratio: share of routable rows kept.
        hidden: D.
        values: "normal", or what is special: "ties" (zero router), "nan", "inf" (in some rows of
            x).
        options: of the gate and of the scatter: activation, gate_scale, gate_bias, gate_mlp,
            scale_skipped.
    """

    name: str
    sequences: tuple[str, ...]
    ratio: float = 0.5
    hidden: int = 12
    layout: Layout = "packed"
    values: str = "normal"
    bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The test id."""
        return self.name

    @property
    def finite(self) -> bool:
        """No NaN or infinity goes in."""
        return self.values in ("normal", "ties")

    @property
    def is_batch(self) -> bool:
        """All sequences have one length."""
        lengths = {
            sum(int(word[1:] or 1) for word in sequence.split() if word != "|")
            for sequence in self.sequences
        }
        return len(lengths) == 1

    @property
    def gate(self) -> dict[str, Any]:
        """The keyword arguments of `route`."""
        names = ("gate_scale", "gate_bias", "activation")
        return {name: self.options[name] for name in names if name in self.options}

    @property
    def scatter(self) -> dict[str, bool]:
        """The keyword arguments of `weighted_scatter_add`."""
        names = ("gate_mlp", "scale_skipped")
        return {name: self.options[name] for name in names if name in self.options}

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
        """Tensors of the sample; the same every time."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).to(device)

        plan = self.plan(device)
        slots = plan.num_slots(LAYER, self.layout)
        shape: tuple[int, ...] = (slots, self.hidden)
        if self.layout == "padded":
            shape = (plan.num_sequences, plan.max_kept(LAYER), self.hidden)
        x = normal(plan.num_rows, self.hidden)
        weight = normal(self.hidden) / self.hidden**0.5
        if self.values == "ties":
            weight = torch.zeros_like(weight)
        special = {"nan": [float("nan")], "inf": [float("inf"), -float("inf")]}
        for i, value in enumerate(special.get(self.values, [])):
            rows = (plan.kind == ROUTABLE).nonzero()[i::5, 0]
            x[rows, rows % self.hidden] = value
        return Case(
            sample=self,
            plan=plan,
            x=x,
            router_weight=weight,
            router_bias=normal(1) if self.bias else None,
            norm_weight=normal(self.hidden),
            attn_out=normal(*shape),
            update=normal(*shape),
        )

    def plan(self, device: str = "cpu") -> RoutingPlan:
        """The routing plan of the batch, made from counts."""
        kind: list[int] = []
        pool: list[int] = []
        bounds, routable, always = [0], [], []
        next_pool = 0
        for sequence in self.sequences:
            counts, text = [0], 0
            for word in sequence.split():
                letter, length = word[0], int(word[1:] or 1)
                if letter == "|":
                    counts.append(0)
                    continue
                rows = {"t": ALWAYS, "v": ROUTABLE, ".": PADDING}[letter]
                kind += [rows] * length
                pool += [next_pool + len(counts) - 1] * length
                counts[-1] += length if letter == "v" else 0
                text += length if letter == "t" else 0
            next_pool += len(counts)
            bounds.append(len(kind))
            routable.append(counts)
            always.append(text)
        several = any(len(counts) > 1 for counts in routable)
        return RoutingPlan.from_counts(
            torch.tensor(kind, dtype=torch.uint8, device=device),
            bounds,
            routable,
            always,
            {LAYER: self.ratio},
            torch.tensor(pool, dtype=torch.int32, device=device) if several else None,
        )


@dataclass(frozen=True, eq=False)
class Case:
    """The tensors of a sample in one dtype."""

    sample: Sample
    plan: RoutingPlan
    x: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    norm_weight: Tensor
    attn_out: Tensor
    update: Tensor


TABLE = (
    Sample("llava15", ("t4 v36 t4",), hidden=64),
    Sample("llava15_late_layer", ("t4 v72 t4",), ratio=0.15),
    Sample("llava_next", ("t4 v183 t4",), ratio=0.35, hidden=64),
    Sample("batch", ("t3 v20 t5", "t1 v20 t7"), ratio=0.7),
    Sample("ragged_packed", ("t3 v20 t5", "v7 t2", "t6", "t1 v30"), ratio=0.4),
    Sample("pad_right", ("t3 v20 t5", "v7 t2 .19", "t6 .22"), layout="padded"),
    Sample("pad_left", (".2 t3 v18 t5", ".19 v7 t2", ".22 t6"), layout="padded"),
    Sample("padding_only_row", ("t2 v6", ".8"), layout="padded"),
    Sample("text_only", ("t9", "t4"), layout="padded"),
    Sample("all_routable", ("v40",), ratio=0.3),
    Sample("k_zero", ("t2 v9 t1", "v3 t4"), ratio=0.0, layout="padded"),
    Sample("k_zero_no_text", ("v5", "v9"), ratio=0.1),
    Sample("k_all", ("t2 v9 t1", "v3 t4"), ratio=1.0),
    Sample("all_tied", ("t2 v50 t1", "v31"), values="ties"),
    Sample("nan", ("t2 v30 t1", "v11 t1"), values="nan"),
    Sample("infinite", ("t2 v30 t1", "v11 t1"), values="inf"),
    Sample("pools", ("t2 v9 | t1 v14 t3 | v5", "v8 t2", "v4 | v4"), ratio=0.6),
    Sample("pools_padded", ("t2 v9 | t1 v14 t3", "v8 t2 | v3 .16"), layout="padded"),
    Sample("hidden_1", ("t2 v13 t1",), hidden=1),
    Sample("hidden_17", ("t2 v13 t1", "v5 t3"), hidden=17),
    Sample("hidden_4096", ("t2 v13 t1",), hidden=4096),
    Sample("one_row", ("v1",), ratio=1.0),
    Sample("empty_batch", ()),
    Sample("empty_sequence", ("v4 t1", "", "t2"), ratio=0.3),
    Sample("no_bias", ("t2 v20",), bias=False),
    Sample("sigmoid", ("t2 v20", "v9"), options={"activation": "sigmoid", "gate_bias": 0.0}),
    Sample("softmax", ("t2 v20", "t3", "v9"), options={"activation": "softmax", "gate_scale": 1.0}),
    Sample("no_activation", ("t2 v20",), options={"activation": "none", "gate_scale": 0.5}),
    Sample("ungated", ("t2 v20",), options={"gate_mlp": False}),
    Sample("unscaled", ("t2 v20",), options={"scale_skipped": False}),
)  # fmt: skip


def distinct(case: Case, gap: float = 1e-4) -> bool:
    """Whether a gap separates kept from skipped logits in every pool: small steps are safe."""
    plan = case.plan
    logits = reference.score(case.x.double(), case.router_weight.double(), None)
    _, inverse = reference.select(logits, plan, LAYER)
    pool = reference.pools(plan)
    for p in range(plan.num_pools):
        rows = (plan.kind == ROUTABLE) & (pool == p)
        kept, skipped = logits[rows & (inverse >= 0)], logits[rows & (inverse < 0)]
        if len(kept) and len(skipped) and not (kept.min() - skipped.max() > gap):
            return False
    return True


def max_err(out: Tensor, exact: Tensor) -> float:
    """Largest absolute difference of finite entries; infinite if the others differ."""
    out, exact = out.detach().double(), exact.detach().double()
    if out.shape != exact.shape:
        return float("inf")
    finite = exact.isfinite()
    if not torch.equal(out.isfinite(), finite):
        return float("inf")
    if not torch.equal(out[~finite].nan_to_num(nan=0.5), exact[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    return float((out - exact)[finite].abs().max()) if finite.any() else 0.0


def assert_no_worse(
    out: Tensor, eager: Tensor, exact: Tensor, what: str = "output", scale: float | None = None
) -> None:
    """The error against float64 is at most twice that of eager PyTorch in the same dtype.

    One unit in the last place of the largest entry is added: eager may hit the exact value, and a
    sum in another order may then still round the other way. `scale` replaces the largest entry
    where a sum cancels: the sum of the absolute values of its terms. Nothing is wider than
    float64: there `eager` is the float32 result, its error is scaled by the ratio of the two
    precisions, and `exact` is allowed the error that `out` is.
    """
    if scale is None:
        magnitude = exact.detach().double().abs().nan_to_num(0, 0, 0)
        scale = float(magnitude.max()) if exact.numel() else 0.0
    unit = torch.finfo(out.dtype).eps * scale
    precision = torch.finfo(out.dtype).eps / torch.finfo(eager.dtype).eps
    allowed = 2 * precision * max_err(eager, exact) + unit
    if out.dtype == torch.float64:
        allowed *= 2
    assert allowed < float("inf"), f"{what}: eager PyTorch and float64 disagree on NaN or infinity"
    error = max_err(out, exact)
    assert error <= allowed, f"{what}: error {error:.3e}, eager PyTorch allows {allowed:.3e}"


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def unaligned(x: Tensor) -> Tensor:
    """The same values at an odd storage offset."""
    storage = x.new_empty(x.numel() + 1)
    storage[1:] = x.reshape(-1)
    return storage[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


__all__ = [
    "DTYPES",
    "LAYER",
    "TABLE",
    "Case",
    "Sample",
    "acc_dtype",
    "assert_no_worse",
    "distinct",
    "max_err",
    "nbytes",
    "strided",
    "unaligned",
]
