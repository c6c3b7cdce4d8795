"""plans/NAME.stopped: that the rest of a sweep was not started, and why, for people who ask later.

Written by the driver at the end of a run, and removed by the next one of the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from orchestrator.records import parse_record, timestamp
from orchestrator.storage import Storage

_DIRECTORY, _SUFFIX = "plans", ".stopped"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A sweep whose first trials all failed alike."""

    plan: str
    """Its name."""
    reason: str
    """Why the first of them failed."""
    trials: tuple[str, ...]
    """Keys of those that were not started."""
    at: str
    """UTC, ISO format."""


def note_stopped(storage: Storage, plan: str, reason: str, trials: Collection[str]) -> None:
    """Put on record that these trials of a sweep were not started."""
    record = Stopped(plan=plan, reason=reason, trials=tuple(sorted(trials)), at=timestamp())
    storage.replace(_name(plan), json.dumps(asdict(record), indent=1).encode())


def forget_stopped(storage: Storage, plan: str) -> None:
    """Remove what an earlier run of a sweep put on record."""
    storage.remove(_name(plan))


def read_stopped(storage: Storage, plans: Iterable[str]) -> tuple[Stopped, ...]:
    """Return which of these sweeps were stopped by their last run."""
    read = storage.read_many(_name(plan) for plan in plans)
    records = [
        parse_record(storage.place(name), data, ("plan", "reason", "trials", "at"))
        for name, data in read.items()
    ]
    return tuple(
        Stopped(plan=r["plan"], reason=r["reason"], trials=tuple(r["trials"]), at=r["at"])
        for r in records
    )


def _name(plan: str) -> str:
    return f"{_DIRECTORY}/{plan}{_SUFFIX}"
