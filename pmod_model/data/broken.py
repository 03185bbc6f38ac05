"""What becomes of records that cannot be used: an error, or a report of what was left out."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from pmod_model.data.errors import InputError

Policy = Literal["error", "skip"]
POLICIES = ("error", "skip")
SHOWN = 20
KINDS = (
    "record",
    "image path",
    "missing image",
    "unreadable image",
    "large image",
    "image count",
    "special token",
    "no text",
    "no labels",
    "template",
    "length",
)


class BrokenRecords:
    """Broken records of a data set: each is an error at once, or counted by kind and left out.

    Kinds are those of `KINDS`.

    Attributes:
        ids: of the records left out, by kind, in the order found.
        messages: of the first `SHOWN` of them.

    Args:
        policy: "error", or "skip".
        max_share: of broken records among all, above which `check` refuses the data set.

    Raises:
        InputError: an unknown policy, or a share outside [0, 1].
    """

    def __init__(self, policy: Policy = "error", max_share: float = 0.05) -> None:
        if policy not in POLICIES:
            raise InputError("data", "on_broken", " or ".join(POLICIES), repr(policy))
        if not 0 <= max_share <= 1:
            raise InputError("data", "max_broken_share", "a number in [0, 1]", max_share)
        self.policy = policy
        self.max_share = max_share
        self.ids: dict[str, list[str]] = defaultdict(list)
        self.messages: list[str] = []

    @property
    def counts(self) -> dict[str, int]:
        """Records left out, by kind."""
        return {kind: len(ids) for kind, ids in self.ids.items()}

    @property
    def total(self) -> int:
        """Records left out."""
        return sum(self.counts.values())

    def add(self, record_id: str, error: InputError) -> None:
        """Count a broken record.

        Raises:
            InputError: `error` itself, if the policy is "error".
        """
        if self.policy == "error":
            raise error
        self.ids[error.kind].append(record_id)
        if len(self.messages) < SHOWN:
            self.messages.append(str(error))

    def check(self, total: int, name: str) -> None:
        """Refuse a data set of `total` records, broken ones included, of which too many are broken.

        Raises:
            InputError: names the share, the kinds, the first ids and the first message.
        """
        if self.total == 0 or (self.total <= self.max_share * total and self.total < total):
            return
        ids = [record_id for found in self.ids.values() for record_id in found]
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        got = f"{self.summary()} of {total}, ids {', '.join(ids[:SHOWN])}{more}"
        expected = f"at most {self.max_share:.1%} broken records, and one that is not"
        raise InputError(name, "records", expected, got, f"the first: {self.messages[0]}")

    def summary(self) -> str:
        """One line: how many, and of which kinds."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
        return f"{self.total} broken" + (f" ({kinds})" if kinds else "")

    def to_dict(self) -> dict[str, Any]:
        """Policy, counts, ids and the first messages, as JSON values."""
        return {
            "on_broken": self.policy,
            "max_broken_share": self.max_share,
            "total": self.total,
            "counts": self.counts,
            "ids": dict(self.ids),
            "messages": self.messages,
        }

    def save(self, path: Path) -> None:
        """Write `to_dict` as JSON, beside and renamed."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
