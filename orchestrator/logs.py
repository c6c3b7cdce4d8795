"""logs/: the end of what measured trials printed, one small file a row, for people.

That of an attempt without a row is in its record in `attempts/`. No number rests on a log: one that
cannot be written, or whose worker dies right after the row, is missed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from analysis.observations import ObservationId
from orchestrator.storage import Storage

DIRECTORY = "logs"
TAIL = 8000
"""Characters of a log that are kept, the last ones."""


def file_name(name: ObservationId) -> str:
    """Return where the log of an observation is, in the project's storage."""
    return f"{DIRECTORY}/{name[0]}-{name[1]}.txt"


def tail(path: Path) -> str | None:
    """Return the end of a log file; None where it is empty or cannot be read."""
    try:
        return path.read_text(errors="replace")[-TAIL:] or None
    except OSError:
        return None


def keep(storage: Storage, name: ObservationId, log: str | None) -> None:
    """Keep the log of an observation whose row was just written, if it printed anything."""
    if log is not None:
        with suppress(OSError):
            storage.create(file_name(name), log.encode(), durable=False)
