"""What small records of a project, JSON objects, have in common: times, types, what is left out.

Whoever can write to a project can write anything into its records, and a later isoflop writes what
this one does not know. So each record is checked against its types before anything is done with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from analysis.errors import InputError

Record = TypeVar("Record")
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
_LARGE = 1e300
"""Nothing that is measured reaches it; a whole number beyond is no float."""


def _instant(text: str) -> str:
    """Refuse what is no time with a time zone: others cannot be compared."""
    try:
        moment = datetime.fromisoformat(text)
        moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"should be a time, and is {text!r}") from error
    if moment.tzinfo is None:
        raise ValueError(f"should have a time zone, and is {text!r}")
    return text


Instant = Annotated[str, AfterValidator(_instant)]
"""A time in ISO format, with its time zone."""
Whole = Annotated[int, Field(ge=0, lt=2**63)]
"""A whole number that is not negative and that every reader can hold."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file of a project that could not be used, and that was done without."""

    file: str
    """Its name in the project."""
    reason: str
    """Why it is left out, and what to do about it, in a sentence that names it."""

    def __str__(self) -> str:
        return f"left out: {self.reason}"


def timestamp() -> str:
    """Return the time now, as records have it: UTC, ISO format."""
    return datetime.now(UTC).isoformat()


def parse_record(kind: type[Record], place: str, data: bytes) -> Record:
    """Return a record of a project as a value of `kind`, with the types that this says.

    Keys that `kind` does not have are passed over: a later version may say more.

    Raises
    ------
    InputError
        If it is damaged, lacks something, or has a value of another type.
    """
    if kind not in _ADAPTERS:  # making one takes a hundred times as long as using it
        _ADAPTERS[kind] = TypeAdapter(kind)
    adapter = _ADAPTERS[kind]
    try:
        record: Record = adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise unreadable(place, reason_of(error)) from error
    return record


def unreadable(place: str, reason: str) -> InputError:
    """Return the error that says that a record is not one that this version reads."""
    return InputError(
        f"{place} is no record that this isoflop reads ({reason}): it is damaged, or another "
        "version wrote it; move it away"
    )


def reason_of(error: ValidationError) -> str:
    """Return what is wrong with the first wrong value of a record, and where."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def number_in(values: object, name: str) -> float | None:
    """Return a finite number of a table that anybody may have written, None where it has none."""
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGE else None
