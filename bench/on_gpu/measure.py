"""Times the candidates of one cell in turn, in every mode, on one clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from agreement import assert_agree, tensors
from timing import Contest, significant

from on_gpu.clocks import Call, Clock, Pending
from on_gpu.results import MODES

LEAST_ROUNDS, MOST_ROUNDS = 5, 50
IN_A_ROW = 10  # calls per timing of a warm call, fewer if they take long
LONG = 1000.0  # microseconds; a call of this length is timed alone

Announce = Callable[[str | None], None]
Times = Mapping[tuple[str, str], float]  # microseconds by candidate and mode


@dataclass
class Entry:
    """A candidate: how it is called, and what is found out about it."""

    call: Call
    replay: Call | None = None
    found: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


def first_call(contest: Contest, name: str, expected: Any) -> None:
    """Call a candidate once on fresh inputs and compare its result with ours."""
    rows = contest.copies[0]
    rows.refresh()
    out = contest.peers[name](rows)
    if name not in contest.unlike:
        assert_agree(out, expected, name)


def admit(contest: Contest, clock: Clock, announce: Announce) -> dict[str, Entry]:
    """Ours, and the peers that run and agree; the others with their error.

    A candidate is announced before it is called: it may take the process down.
    """
    rows = contest.copies[0]
    announce("ours")
    rows.refresh()
    expected = [t.detach().clone() for t in tensors(contest.ours(rows))]
    clock.settle()
    entries = {"ours": Entry(partial(contest.ours, rows))}
    for name, peer in contest.peers.items():
        announce(name)
        entries[name] = Entry(partial(peer, rows))
        try:
            first_call(contest, name, expected)
        except Exception as error:
            entries[name].found["error"] = brief(error)
        clock.settle()  # an error of the device itself ends the process here
    return entries


def brief(error: BaseException) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]


def capture(entry: Entry, clock: Clock) -> None:
    """Make the graph of a candidate, or note why there is none."""
    if entry.found.get("waits"):
        entry.found["graph_error"] = f"it waits for the device {entry.found['waits']} times a call"
        return
    try:
        entry.replay = clock.capture(entry.call)
    except Exception as error:
        entry.found["graph_error"] = brief(error)
        clock.settle()


def measure(contest: Contest, clock: Clock, seconds: float, announce: Announce) -> dict[str, Any]:
    """The figures of a cell: about `seconds` of timing, after the first calls."""
    with clock.session(), torch.set_grad_enabled(contest.grad):
        entries = admit(contest, clock, announce)
        announce(None)  # from here on they take turns
        well = {name: entry for name, entry in entries.items() if "error" not in entry.found}
        for name, counts in clock.count({n: entry.call for n, entry in well.items()}).items():
            entries[name].found.update(counts)
        for entry in well.values():
            capture(entry, clock)
        race(well, clock, seconds)
    return {name: described(entry) for name, entry in entries.items()}


def race(entries: dict[str, Entry], clock: Clock, seconds: float) -> None:
    """Rounds in which everybody has a turn in every mode, in an order that moves on."""
    one_round(entries, clock, 0, {})  # warms up
    start = time.perf_counter()
    first = one_round(entries, clock, 0, {})
    cost = time.perf_counter() - start
    for number in range(round(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / cost)))):
        for (name, mode), taken in one_round(entries, clock, number, first).items():
            entries[name].samples.setdefault(mode, []).append(taken)


def one_round(
    entries: dict[str, Entry], clock: Clock, number: int, first: Times
) -> dict[tuple[str, str], float]:
    """Microseconds by candidate and mode. `first` tells how long a call takes, about."""
    pending: dict[tuple[str, str], Pending] = {}
    order = list(entries)
    turn = number % len(order)
    for name in order[turn:] + order[:turn]:
        for mode in MODES:
            call = entries[name].replay if mode.endswith("graph") else entries[name].call
            if call is not None:
                cold = mode.startswith("cold")
                usual = first.get((name, mode), LONG)
                calls = 1 if cold else max(1, min(IN_A_ROW, int(LONG / usual)))
                pending[name, mode] = clock.start(call, calls, cold=cold)
    clock.settle()
    return {key: taken() for key, taken in pending.items()}


def described(entry: Entry) -> dict[str, Any]:
    """What goes into the results."""
    found = entry.found
    return {
        "error": found.get("error"),
        "graph_error": found.get("graph_error"),
        "launches": found.get("launches"),
        "waits": found.get("waits"),
        "peak_mb": found.get("peak_mb"),
        "figures": {mode: spread(times) for mode, times in entry.samples.items()},
    }


def spread(times: list[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile, and of how many."""
    cuts = quantiles(times, n=10, method="inclusive")
    return {
        "median_us": significant(cuts[4]),
        "p10_us": significant(cuts[0]),
        "p90_us": significant(cuts[8]),
        "rounds": len(times),
    }
