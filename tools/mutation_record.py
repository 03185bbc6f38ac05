"""docs/mutation.json: how many mutants of the CUDA kernels the tests killed, and which survived.

Mutants that do not compile count for nothing. `score` is the share of killed ones among all others,
`score_without_equivalent` that among those that can be killed at all: without the survivors whose
reason shows that no result depends on the change (`equivalent`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mutants import KINDS, Mutant

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
RECORD = ROOT / "docs" / "mutation.json"
LEAST_SCORE = 95.0  # of the mutants that can be killed


class Result(NamedTuple):
    """What became of a mutant."""

    verdict: str  # "killed", "survived" or "does not compile"
    by: str = ""  # the step that killed it
    how: str = ""  # "failure", "crash" or "time limit"


Record = dict[str, Any]
Key = tuple[str, str, str, int]  # of a mutant


def kernel_hash(folder: Path = KERNELS) -> str:
    """Returns the SHA-256 of the names and contents of the kernels."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.cuh")):
        digest.update(f"{file.name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def load(path: Path = RECORD) -> Record | None:
    """Returns the record, or None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def key_of(survivor: Record) -> Key:
    """The key of the mutant that a survivor in the record is."""
    return survivor["file"], survivor["text"], survivor["kind"], survivor["occurrence"]


def score(killed: int, others: int) -> float:
    """A share in percent, rounded down: 100 means all."""
    return int(1000 * killed / (killed + others)) / 10 if killed + others else 0.0


def rescored(record: Record) -> Record:
    """The record with everything that follows from its counts and from what its survivors say."""
    equivalent = Counter(s["kind"] for s in record["survivors"] if s["equivalent"])
    kinds = {
        kind: {**record["kinds"][kind], "equivalent": equivalent[kind]}
        for kind in record["kinds"]
        if kind != "all"
    }
    total = Counter[str]()
    for counts in kinds.values():
        total.update(counts)
    killed, survived = total["killed"], total["survived"]
    return record | {
        "score": score(killed, survived),
        "score_without_equivalent": score(killed, survived - total["equivalent"]),
        "kinds": kinds | {"all": dict(total)},
    }


def make(results: Mapping[Mutant, Result], sources: str, earlier: Record | None) -> Record:
    """Returns the record of a whole run; reasons come from an earlier record."""
    reasons = {key_of(s): s for s in earlier["survivors"]} if earlier else {}
    survivors = []
    for m in (m for m, result in results.items() if result.verdict == "survived"):
        known = reasons.get(m.key, {"equivalent": False, "reason": ""})
        survivors.append(
            {
                **{"file": m.file, "line": m.line, "kind": m.kind, "text": m.text},
                **{"occurrence": m.occurrence, "before": m.before, "after": m.after},
                **{"equivalent": known["equivalent"], "reason": known["reason"]},
            }
        )
    verdicts = Counter((m.kind, result.verdict) for m, result in results.items())
    return rescored(
        {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "sources": sources,
            **{"score": 0, "score_without_equivalent": 0},
            "kinds": {
                kind: {
                    "mutants": sum(n for (k, _), n in verdicts.items() if k == kind),
                    "does not compile": verdicts[kind, "does not compile"],
                    "killed": verdicts[kind, "killed"],
                    "survived": verdicts[kind, "survived"],
                }
                for kind in KINDS
            },
            "killed_by": dict(Counter(r.by for r in results.values() if r.by).most_common()),
            "killed_how": dict(Counter(r.how for r in results.values() if r.how).most_common()),
            "survivors": survivors,
        }
    )


def problems(record: Record | None, mutants: Sequence[Mutant], sources: str) -> list[str]:
    """Returns what is wrong with the record for kernels with these mutants and this hash."""
    if record is None:
        return ["there is no record yet: make mutate"]
    if record["sources"] != sources:
        return [
            f"made on {record['date']} from kernels {record['sources'][:12]}; "
            f"these are {sources[:12]}: make mutate"
        ]
    found = []
    if record["kinds"]["all"]["mutants"] != len(mutants):
        found.append(f"{record['kinds']['all']['mutants']} mutants; now there are {len(mutants)}")
    if record != rescored(record):
        found.append("survivors were edited since it was scored: tools/mutate.py --rescore")
    if record["score_without_equivalent"] < LEAST_SCORE:
        found.append(f"score {record['score_without_equivalent']} % is under {LEAST_SCORE} %")
    current = {m.key: m for m in mutants}
    for survivor in record["survivors"]:
        if not survivor["reason"].strip():
            found.append(f"no reason: {current.get(key_of(survivor), survivor)}")
    return found


def save(record: Record, path: Path = RECORD) -> None:
    """Writes the record."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def summary(record: Record) -> str:
    """Says in a few lines what a record holds."""
    n = record["kinds"]["all"]
    return (
        f"{n['mutants']} mutants: {n['killed']} killed, {n['survived']} survived "
        f"({n['equivalent']} of them equivalent), {n['does not compile']} do not compile\n"
        f"score {record['score']} %, without the equivalent ones "
        f"{record['score_without_equivalent']} %"
    )
