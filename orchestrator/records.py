"""What small records of a project, JSON objects, have in common."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from analysis.errors import InputError


def timestamp() -> str:
    """The time now, as records have it: UTC, ISO format."""
    return datetime.now(UTC).isoformat()


def parse_record(place: str, data: bytes, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object of a project.

    Raises
    ------
    InputError
        If it is damaged, or lacks what is `needed`.
    """
    try:
        found = dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise InputError(f"{place} is damaged ({error}): move it away and run again") from error
    if missing := [name for name in needed if name not in found]:
        raise InputError(
            f"{place} is no record of this version, it lacks {', '.join(missing)}: move it away"
        )
    return found
