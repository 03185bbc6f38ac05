"""Selection by the Triton kernels: bit for bit that of the CPU backend, one program or many."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pmod_ops._triton import select_long
from pmod_ops._triton.plan import Gate, Plan, Selected
from pmod_ops._triton.select import fits, launch_config, launch_options, select_short
from pmod_ops.route import ACTIVATIONS, scratch_bytes

LONG = 16385  # a max_length that one program does not select from
WAYS = pytest.mark.parametrize("many", [False, True], ids=["one_program", "many_programs"])
PADDING, ROUTABLE, ALWAYS = 0, 1, 2


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Problem:
    """Sequences of a batch, of which every pool keeps k rows, if it has so many."""

    lengths: list[int]
    k: list[int]
    seed: int = 0
    distinct: int = 0  # values of the logits; 0: normal ones
    pools: int = 0  # of a sequence; 0: one, without ids
    padded: bool = False
    all_routable: bool = True

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rows = sum(self.lengths)

        def below(count: int) -> Tensor:
            return torch.randint(count, (rows,), generator=generator, dtype=torch.int32)

        self.kind = torch.full((rows,), ROUTABLE, dtype=torch.uint8)
        if not self.all_routable:
            self.kind = below(8).clamp(max=ROUTABLE).to(torch.uint8) + (below(8) == 0).byte()
        self.logits = torch.randn(rows, generator=generator)
        if self.distinct:
            self.logits = below(self.distinct).float() - 1
        self.bounds = numbers(0, *self.lengths).cumsum(0, dtype=torch.int32)
        self.pool_id = None
        if self.pools:
            sequence = torch.repeat_interleave(torch.tensor(self.lengths))
            self.pool_id = (sequence * self.pools).int() + below(self.pools)

    def layout(self) -> tuple[Tensor, int]:
        """First slot of every sequence, and how many slots there are."""
        kept = []
        for b, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            kind = self.kind[begin:end]
            count = int((kind == ALWAYS).sum())
            for pool in range(b * max(self.pools, 1), (b + 1) * max(self.pools, 1)):
                mine = kind == ROUTABLE
                if self.pool_id is not None:
                    mine &= self.pool_id[begin:end] == pool
                count += max(min(self.k[pool], int(mine.sum())), 0)
            kept.append(count)
        if not self.padded:
            return numbers(0, *kept).cumsum(0, dtype=torch.int32)[:-1], sum(kept)
        # right-aligned, with more filler than needed
        longest = max(kept, default=0) + 2
        starts = [(b + 1) * longest - n for b, n in enumerate(kept)]
        return numbers(*starts), len(kept) * longest + 3 * bool(kept)

    def arguments(self, max_length: int = 0, activation: str = "tanh") -> tuple[object, ...]:
        """Of pmod::select."""
        starts, slots = self.layout()
        longest = max(*self.lengths, max_length, 0)
        plan = (self.kind, self.bounds, self.pool_id, numbers(*self.k), starts, slots, longest)
        return self.logits, *plan, 0.2, 1.0, ACTIVATIONS.index(activation)

    def check(self, kernels, many: bool = False, activation: str = "tanh") -> None:
        """Index and inverse are those of the CPU, and gates to two units in the last place."""
        arguments = self.arguments(LONG if many else 0, activation)
        gate, index, inverse, scratch = kernels["select"](*arguments)
        expected_gate, expected_index, expected_inverse, _ = torch.ops.pmod.select(*arguments)
        assert torch.equal(index, expected_index)
        assert torch.equal(inverse, expected_inverse)
        # around 1, with an activation of at most 1 that is scaled down
        torch.testing.assert_close(gate, expected_gate, rtol=0, atol=2.4e-7, equal_nan=True)
        assert bool((gate[self.kind != ROUTABLE] == 1).all())
        sizes = len(self.logits), len(self.lengths), len(self.k), arguments[7]
        assert scratch.shape[0] == scratch_bytes(*sizes)


@WAYS
@pytest.mark.parametrize("distinct", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 1024, 2500])
def test_of_equal_logits_the_first_rows_are_kept(rows, distinct, many, kernels):
    for k in {0, rows // 4, rows - 1, rows}:
        Problem([rows], [k], distinct=distinct).check(kernels, many)


@WAYS
@pytest.mark.parametrize("rows", [12, 1100])
def test_special_numbers_rank_as_in_a_stable_sort(rows, many, kernels):
    nans = numbers(0x7F800001, 0x7FC00000, -1, 0x7FFFFFFF).view(torch.float32)
    values = [math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, 1.0, -3e38]
    special = torch.cat((torch.tensor(values), nans))
    generator = torch.Generator().manual_seed(rows)
    for k in range(0, rows + 1, max(1, rows // 5)):
        problem = Problem([rows], [k])
        problem.logits = special[torch.randint(len(special), (rows,), generator=generator)]
        problem.check(kernels, many)


@WAYS
def test_numbers_that_differ_in_any_bit_are_told_apart(many, kernels):
    for bit in range(0, 32, 3 if many else 1):
        problem = Problem([90], [30], seed=bit, distinct=2)
        one = torch.where(problem.logits > -1, 1 << bit, 0) ^ 0x3F800000
        problem.logits = one.to(torch.int32).view(torch.float32)
        problem.check(kernels, many)


@WAYS
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequences_of_a_batch_do_not_mix(activation, padded, many, kernels):
    lengths, k = [700, 0, 3, 1300, 1], [300, 4, 0, 2000, 1]
    batch = Problem(lengths, k, seed=1, padded=padded, all_routable=False)
    batch.check(kernels, many, activation)


@WAYS
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("distinct", [0, 4])
def test_pools_may_interleave(distinct, padded, many, kernels):
    k = [0, 30, 500, 7, 1, 90, 40, 3, 2]
    options = {"distinct": distinct, "pools": 3, "padded": padded, "all_routable": False}
    Problem([600, 1, 1100], k, seed=2, **options).check(kernels, many)


@WAYS
def test_rows_of_a_pool_that_does_not_exist_are_not_kept(many, kernels):
    problem = Problem([500], [10, 500, 30], pools=3, all_routable=False)
    ids = numbers(0, 1, 2, -1, 3, -(2**31), 2**31 - 1)
    problem.pool_id = ids[torch.arange(500) % 7]
    missing = (problem.pool_id < 0) | (problem.pool_id > 2)
    arguments = problem.arguments(LONG if many else 0)
    gate, *found, _ = kernels["select"](*arguments)
    assert bool((gate[missing & (problem.kind == ROUTABLE)] != 1).any())
    problem.kind[missing & (problem.kind == ROUTABLE)] = PADDING
    problem.pool_id[missing] = 0
    _, *expected, _ = torch.ops.pmod.select(*problem.arguments())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@WAYS
def test_a_batch_without_pools_keeps_what_is_always_kept(many, kernels):
    problem = Problem([50, 20], [1, 1], all_routable=False)
    arguments = list(problem.arguments(LONG if many else 0))
    always = (problem.kind == ALWAYS).nonzero()[:, 0].int()
    first = int((problem.kind[:50] == ALWAYS).sum())
    arguments[3:7] = torch.zeros(70, dtype=torch.int32), numbers(), numbers(0, first), len(always)
    _, index, _, _ = kernels["select"](*arguments)
    assert torch.equal(index, always)


@pytest.mark.parametrize("max_length", [0, LONG])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_batches_without_rows(lengths, max_length, kernels):
    bounds, starts = torch.zeros(len(lengths) + 1, dtype=torch.int32), numbers(*lengths)
    plan = (torch.empty(0, dtype=torch.uint8), bounds, None, starts, starts, 4, max_length)
    gate, index, inverse, _ = kernels["select"](torch.empty(0), *plan, 0.2, 1.0, 3)
    assert gate.shape == inverse.shape == (0,)
    assert index.tolist() == [-1] * 4


@pytest.mark.parametrize("activation", ["tanh", "softmax"])
def test_sequences_that_no_program_holds(activation, kernels):
    """One a little too long, and short ones among them."""
    problem = Problem([100, 16500, 0, 7], [30, 5000, 1, 7], distinct=900, all_routable=False)
    problem.check(kernels, activation=activation)


def test_seventy_thousand_rows(kernels):
    Problem([70000], [21000], seed=3).check(kernels)


def test_pools_of_long_sequences(kernels):
    k = [7, 3000, 100, 0, 1500, 1, 900, 5000]
    Problem([100, 20000], k, distinct=100, pools=4, padded=True).check(kernels)


def test_one_program_selects_from_the_longest_sequence_that_it_may(kernels):
    Problem([16384], [5000], distinct=700).check(kernels)
    Problem([8192], [1000, 2000], distinct=700, pools=2).check(kernels)


@pytest.mark.parametrize(
    ("max_length", "config"),
    [(0, (1024, 4)), (1024, (1024, 4)), (1025, (2048, 4)), (4096, (4096, 8)), (16384, (16384, 16))],
)
def test_a_block_covers_a_sequence(max_length, config):
    assert tuple(launch_config(max_length)) == config


def test_registers_are_not_saved_for_other_programs(monkeypatch):
    assert launch_options(launch_config(1))["maxnreg"] == 255
    assert "maxnreg" not in launch_options(launch_config(16384))  # there are no more
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "maxnreg" not in launch_options(launch_config(1))


@pytest.mark.parametrize(("rows", "pools"), [(16384, None), (8192, numbers(0))])
def test_sequences_that_fit_one_program(rows, pools):
    plan = Plan(numbers(), numbers(), pools, numbers(), numbers(), 0, rows)
    assert fits(plan)
    assert not fits(plan._replace(max_length=rows + 1))


@pytest.mark.parametrize(
    ("rows", "bits"), [(0, 0), (1, 0), (2, 8), (256, 8), (257, 16), (65537, 24), (1 << 24, 24)]
)
def test_a_pass_for_every_digit_of_the_keys(rows, bits):
    assert select_long.row_bits(rows) == bits
    shifts = list(select_long.shifts(rows))
    assert shifts == list(range(24 + bits, -1, -8))
    assert len(shifts) < select_long.OPEN_COUNTS


@pytest.mark.parametrize(("rows", "sequences", "pools"), [(70000, 3, 3), (1 << 20, 1, 64)])
def test_the_scratch_of_the_schema_is_enough(rows, sequences, pools):
    memory = torch.empty(scratch_bytes(rows, sequences, pools, LONG), dtype=torch.uint8)
    parts = rows // select_long.PART_ROWS + sequences
    scratch = select_long.Scratch.of(memory, torch.ones(pools, dtype=torch.int32), parts)
    assert scratch.counts.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert sum(t.numel() * t.element_size() for t in scratch) == len(memory)


def guarded(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory, and what is in the middle of it."""
    memory = torch.full((size + 2 * 4096,), 77, dtype=dtype)
    return memory, memory[4096 : 4096 + size]


@WAYS
@pytest.mark.parametrize(
    "starts", [(0, 0), (-50, 3), (90, 20), (2**31 - 1, 0), (10, 10**5), (-(2**31), -1)], ids=str
)
@pytest.mark.parametrize("max_length", [10, 1500])
@pytest.mark.parametrize("ids", [False, True], ids=["", "pools"])
def test_a_plan_that_does_not_fit_its_rows_does_no_harm(ids, max_length, starts, many, kernels):
    problem = Problem([1500, 700], [900, 90], pools=int(ids), all_routable=False)
    bounds = numbers(-5, 1500, 9000)
    plan = Plan(
        problem.kind, bounds, problem.pool_id, numbers(900, 90), numbers(*starts), 100, max_length
    )
    memories, outputs = zip(
        guarded(2200, torch.float32),
        guarded(100, torch.int32),
        guarded(2200, torch.int32),
        guarded(0, torch.uint8),
        strict=True,
    )
    out = Selected(*outputs)
    (select_long.select_long if many else select_short)(
        problem.logits, plan, Gate(0.2, 1.0, 1), out
    )
    for memory in memories:
        assert bool((memory[:4096] == 77).all())
        assert bool((memory[-4096:] == 77).all())
    written = out.inverse != 77
    assert bool(((out.inverse >= -1) & (out.inverse < 100))[written].all())
    assert bool(((out.index >= -1) & (out.index < 2200)).all())


def test_the_number_of_launches_does_not_depend_on_the_data(kernels, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    call = GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    for distinct in (0, 1):
        launched.clear()
        Problem([3000], [1000], distinct=distinct).check(kernels, many=True)
        assert launched.count("count_digits_kernel") == launched.count("pick_digits_kernel") == 6
        assert len(launched) == 2 * 6 + 4
        launched.clear()
        Problem([3000], [1000], distinct=distinct).check(kernels)
        assert launched == ["select_kernel"]
