"""plans/NAME.stopped: that the rest of a sweep was not started, and why, for people who ask later.

Written by the driver at the end of a run, and removed by the next one of the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from analysis.errors import InputError
from orchestrator.records import Instant, LeftOut, parse_record, timestamp, unreadable
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
    at: Instant
    """UTC, ISO format."""


def note_stopped(storage: Storage, plan: str, reason: str, trials: Collection[str]) -> None:
    """Put on record that these trials of a sweep were not started."""
    record = Stopped(plan=plan, reason=reason, trials=tuple(sorted(trials)), at=timestamp())
    storage.replace(_name(plan), json.dumps(asdict(record), indent=1).encode())


def forget_stopped(storage: Storage, plan: str) -> None:
    """Remove what an earlier run of a sweep put on record."""
    storage.remove(_name(plan))


def read_stopped(
    storage: Storage, plans: Iterable[str]
) -> tuple[tuple[Stopped, ...], list[LeftOut]]:
    """Return which of these sweeps were stopped by their last run, and the records left out."""
    names = {_name(plan): plan for plan in plans}
    stopped, left_out = [], []
    for name, data in storage.read_many(names).items():
        try:
            record = parse_record(Stopped, storage.place(name), data)
            if record.plan != names[name]:
                raise unreadable(storage.place(name), f"it is of the sweep {record.plan}")
            stopped.append(record)
        except InputError as error:
            left_out.append(LeftOut(file=name, reason=str(error)))
    return tuple(stopped), left_out


def _name(plan: str) -> str:
    return f"{_DIRECTORY}/{plan}{_SUFFIX}"
