"""The report: a pure function from results to Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from on_gpu.results import DRY, Results

Entry = dict[str, Any]

TITLES = {
    "glue-forward": "Glue, forward",
    "glue-training": "Glue, forward and backward",
    "weighted_scatter_add-forward": "weighted_scatter_add",
    "weighted_scatter_add-next": "weighted_scatter_add, with the next scores",
    "weighted_scatter_add_-forward": "weighted_scatter_add_, in place",
    "weighted_scatter_add-backward": "weighted_scatter_add, backward",
    "gather-forward": "gather",
    "gather_rmsnorm-forward": "gather_rmsnorm",
    "gather_rmsnorm-backward": "gather_rmsnorm, backward",
    "gather_add_rmsnorm-forward": "gather_add_rmsnorm",
    "gather_add_rmsnorm-backward": "gather_add_rmsnorm, backward",
    "route_gather-backward": "route_gather, backward",
    "route-forward": "route: score and select",
    "select-normal": "Selection, distinct logits",
    "select-narrow": "Selection, logits close to each other",
    "select-tied": "Selection, equal logits",
    "select-coarse": "Selection, few different logits",
}
COMPILE = "compile"
FIRST = ("eager", COMPILE, "official")  # the peers that come first
INTRODUCTION = """\
Times are medians of one call in microseconds, with the 10th and 90th percentile. "cold": the L2
cache was overwritten before. "graph": replayed as a CUDA graph, without what the host does.
A ratio is the time of a peer divided by ours, so more than 1 means that ours is faster: as called /
as graphs, both cold. "of copy" is the time of a device-to-device copy that moves the least bytes of
the job, divided by ours, as graphs. `compile` is the faster of the compiled forms."""


def markdown(results: Results) -> str:
    """The whole report."""
    facts = results["facts"]
    parts = [
        "# GPU run",
        f"{gpu_line(results)}. Started {results['started']}, given {results['minutes']:g} minutes.",
    ]
    if not results["measured"]:
        parts.append(f"**{DRY}**: there was no device; no figure below means anything.")
    parts += ["## Steps", steps(results), *checks(results)]
    if results["cells"]:
        parts += ["## Benchmarks", INTRODUCTION]
    for kind in [*TITLES, *others(results["cells"])]:
        entries = [entry for entry in results["cells"] if entry["kind"] == kind]
        if entries:
            parts += [f"### {TITLES.get(kind, kind)}", cells(entries, results)]
    parts += problems(results)
    if facts:
        parts += ["## Facts", facts_table(facts)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: float | None, results: Results, form: str = "{:.4g}") -> str:
    """A number that was measured, labelled if it was not; a dash if it is not there."""
    if value is None:
        return "-"
    text = form.format(value)
    return text if results["measured"] else f"{text} ({DRY})"


def gpu_line(results: Results) -> str:
    """GPU, torch and commit."""
    facts, sources = results["facts"], results["sources"]
    commit = "sources without a commit"
    if sources:
        commit = f"commit {sources['commit'][:10]}{' with changes' if sources['changed'] else ''}"
    return f"{facts.get('gpu') or 'No GPU'}, torch {facts.get('torch', 'unknown')}, {commit}"


def steps(results: Results) -> str:
    """What became of every step."""
    return table(
        ["step", "status", "", "seconds", "of"],
        [
            [
                step["name"],
                step["status"],
                one_line(step["summary"]),
                figure(step["seconds"], results),
                f"{step['budget_s']:g}",
            ]
            for step in results["steps"]
        ],
    )


def one_line(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())[:300]


def checks(results: Results) -> list[str]:
    """Failed tests and what the sanitizers said."""
    parts = []
    found = (results["tests"], results.get("triton_tests", {}))
    failed = [name for tests in found for name in tests.get("failed", [])]
    if failed:
        parts += ["### Failed tests", "\n".join(f"* `{name}`" for name in failed)]
    if results["sanitizer"]:
        rows = [
            [tool, found["status"], str(found["errors"]), str(found["ours"])]
            for tool, found in results["sanitizer"].items()
        ]
        parts += [
            "### compute-sanitizer",
            table(["tool", "status", "errors", "in our kernels"], rows),
        ]
    return parts


def others(entries: Iterable[Entry]) -> list[str]:
    """Kinds that have no title."""
    return sorted({entry["kind"] for entry in entries} - TITLES.keys())


def median(entry: Entry, name: str, mode: str) -> float | None:
    """A candidate's median in a mode; of the compiled forms, the fastest one's."""
    named = entry["candidates"]
    if name == COMPILE:
        forms = [n for n in named if n.startswith(COMPILE)]
        times = [t for n in forms if (t := one_median(named[n], mode)) is not None]
        return min(times, default=None)
    return one_median(named[name], mode) if name in named else None


def one_median(candidate: Entry, mode: str) -> float | None:
    """The median of one candidate."""
    found = candidate["figures"].get(mode)
    return None if found is None else found["median_us"]


def ratio(entry: Entry, name: str, mode: str, to: str = "ours") -> float | None:
    """How much longer a candidate takes than ours, or than another."""
    theirs, ours = median(entry, name, mode), median(entry, to, mode)
    return None if theirs is None or not ours else theirs / ours


def peers_of(entries: Iterable[Entry]) -> list[str]:
    """The columns of peers: the compiled forms are one."""
    names = [name for entry in entries for name in entry["candidates"]]
    named = {COMPILE if name.startswith(COMPILE) else name: None for name in names}
    found = [name for name in named if name not in ("ours", "memcpy", "triton_memcpy")]
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def cells(entries: Sequence[Entry], results: Results) -> str:
    """The table of one kind."""
    peers = peers_of(entries)
    header = ["rows", "B", "R", "D", "type", "cold", "cold, graph", "warm", "warm, graph"]
    header += [*peers, "GB/s", "of copy", "launches", "peak MB"]
    return table(header, [row(entry, peers, results) for entry in entries])


def row(entry: Entry, peers: Sequence[str], results: Results) -> list[str]:
    """One cell."""
    shape = [entry["geometry"], *(f"{entry[n]:g}" for n in ("batch", "ratio", "hidden"))]
    modes = ("cold", "cold_graph", "warm", "warm_graph")
    times = [spread(entry, mode, results) for mode in modes]
    ratios = [
        " / ".join(figure(ratio(entry, name, mode), results, "{:.3g}") for mode in modes[:2])
        for name in peers
    ]
    ours = entry["candidates"].get("ours", {})
    counts = ", ".join(
        f"{name} {figure(entry['candidates'][name]['launches'], results)}"
        for name in ("ours", "eager", "official")
        if entry["candidates"].get(name, {}).get("launches") is not None
    )
    return [
        *shape,
        entry["dtype"],
        *times,
        *ratios,
        figure(rate(entry), results),
        figure(ratio(entry, "memcpy", "cold_graph"), results, "{:.1%}"),
        counts or "-",
        figure(ours.get("peak_mb"), results),
    ]


def spread(entry: Entry, mode: str, results: Results) -> str:
    """Our median, and between what most rounds were."""
    found = entry["candidates"].get("ours", {}).get("figures", {}).get(mode)
    if found is None:
        return "-"
    text = f"{found['median_us']:.4g} ({found['p10_us']:.4g}-{found['p90_us']:.4g})"
    return text if results["measured"] else f"{text} ({DRY})"


def rate(entry: Entry) -> float | None:
    """GB/s of the least bytes, as a cold graph; as called where there is no graph."""
    taken = median(entry, "ours", "cold_graph") or median(entry, "ours", "cold")
    return None if not taken or entry["bytes"] is None else entry["bytes"] / taken / 1e3


def problems(results: Results) -> list[str]:
    """Everything that has no figures, and why."""
    lines = []
    for entry in results["cells"]:
        where = f"{entry['kind']} {entry['geometry']} B={entry['batch']} R={entry['ratio']}"
        if entry["error"]:
            lines.append(f"* {where}: {one_line(entry['error'])}")
        for name, found in entry["candidates"].items():
            if found["error"]:
                lines.append(f"* {where}, {name}: {one_line(found['error'])}")
    left_out = [f"* {name}" for name in results["left_out"]]
    parts = ["## Without figures", "\n".join(lines)] if lines else []
    return parts + (["## No time was left for", "\n".join(left_out)] if left_out else [])


def facts_table(facts: dict[str, Any]) -> str:
    """All facts, one a line."""
    flat: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            flat += [(f"{name}: {key}", part) for key, part in value.items()]
        else:
            flat.append((name, value))
    return table(["fact", ""], [[name, one_line(str(value))] for name, value in flat])
