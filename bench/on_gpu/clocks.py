"""What measures a call: CUDA events on a GPU, the clock of the process in a dry run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Pending = Callable[[], float]  # microseconds of one call, once the clock has settled

LEAST_SCRAP = 128 << 20  # bytes written to empty the L2 cache, where four times its size is less
WAITED = "called a synchronizing CUDA operation"  # what torch says
MARK = "pmod count "  # how a profile calls the time of a call
APART = 1e-3  # seconds of idle time that tell the kernels of two calls apart in a profile


class Clock(Protocol):
    """Times calls. Everything happens inside `session()`."""

    def session(self) -> AbstractContextManager[Any]:
        """Where calls are made."""
        ...

    def start(self, call: Call, calls: int, *, cold: bool) -> Pending:
        """Make `calls` calls; if `cold`, none of their inputs is in the cache at first."""
        ...

    def settle(self) -> None:
        """Wait until everything has been done."""
        ...

    def capture(self, call: Call) -> Call:
        """`call` recorded once, to be replayed; raises if that cannot be done."""
        ...

    def count(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
        """Launches, waits and memory of one call each, of those that are known."""
        ...


class HostClock:
    """For a dry run: its figures are labelled and mean nothing."""

    def session(self) -> AbstractContextManager[Any]:
        """Nothing to set up."""
        return nullcontext()

    def start(self, call: Call, calls: int, *, cold: bool) -> Pending:
        """Wall-clock time."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken = 1e6 * (time.perf_counter() - start) / calls
        return lambda: taken

    def settle(self) -> None:
        """Nothing runs in the background."""

    def capture(self, call: Call) -> Call:
        """There are no graphs."""
        return call

    def count(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
        """Nothing is launched."""
        return {}


class CudaClock:
    """Events on a stream of its own, on which everything is called.

    On the default stream the backward pass of a graph that was recorded there could not be
    captured. Emptying the cache keeps the device busy for long enough that the host is ahead of it
    when a cold call begins, so that a cold figure shows the host's part only where it exceeds that.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.scrap = torch.empty(max(4 * cache, LEAST_SCRAP), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def session(self) -> AbstractContextManager[Any]:
        """The stream."""
        return torch.cuda.stream(self.stream)

    def start(self, call: Call, calls: int, *, cold: bool) -> Pending:
        """Time between two events."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.scrap.zero_()
        first.record()
        for _ in range(calls):
            call()
        last.record()
        return lambda: 1e3 * first.elapsed_time(last) / calls

    def settle(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        torch.cuda.synchronize()

    def capture(self, call: Call) -> Call:
        """A CUDA graph of the call. It must have been called before."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # autograd's own threads may do meanwhile what the capturing one must not
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def count(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
        """Launches by the profiler, waits by torch's own check, memory by its allocator."""
        found = {
            name: {"waits": waits(call), "peak_mb": peak_mb(call)} for name, call in calls.items()
        }
        for name, number in launches(calls).items():
            found[name]["launches"] = number
        return found


def waits(call: Call) -> int:
    """How often torch had to wait for the device."""
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        call()
    return sum(WAITED in str(warning.message) for warning in caught)


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """Let torch "warn" of every wait for the device, or raise an "error"."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that this is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_mb(call: Call) -> float:
    """Memory that a call needs beside what was there, its outputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 3)


def launches(calls: Mapping[str, Call]) -> dict[str, int | None]:
    """Kernels, copies and fills of one call of each; None where the profiler sees nothing."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for name, call in calls.items():
            torch.cuda.synchronize()
            time.sleep(APART)
            with torch.profiler.record_function(MARK + name):
                call()
                torch.cuda.synchronize()
    return in_windows(list(calls), list(profile.events() or []))


def in_windows(names: list[str], events: list[Any]) -> dict[str, int | None]:
    """The device's events by the call that they belong to, which is told by their time."""
    windows, started = {}, []
    for event in events:
        on_device, marked = event.device_type.name == "CUDA", event.name.startswith(MARK)
        if marked and not on_device:
            windows[event.name.removeprefix(MARK)] = event.time_range
        elif on_device and not marked:
            started.append(event.time_range.start)
    if not started:
        return dict.fromkeys(names)
    early = 1e6 * APART / 3  # the two clocks of a profile differ by some microseconds
    return {
        name: sum(windows[name].start - early <= t <= windows[name].end + early for t in started)
        for name in names
    }
