"""exclude.toml: observations that somebody ruled out, with a reason. The ledger is never edited."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.errors import InputError
from analysis.observations import SCHEMA, equals
from analysis.text_files import decoded
from orchestrator.storage import Refused, Storage

FILE = "exclude.toml"
SELECTORS = [field.name for field in SCHEMA if not pa.types.is_nested(field.type)]
"""Columns by which observations may be ruled out."""


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """One entry: which rows, and why."""

    reason: str
    selectors: Mapping[str, str | int | float | bool]
    """Column = value, all of which must hold; `trial` may be the beginning of a key."""

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} = {value}" for name, value in self.selectors.items())
        return f"{chosen} ({self.reason})"


def read_exclusions(storage: Storage) -> tuple[Exclusion, ...]:
    """The entries of a project's `exclude.toml`, none where there is no such file.

    Raises
    ------
    InputError
        If it is no regular file or no TOML, or an entry has no reason, no selector or an unknown
        one.
    """
    place = storage.place(FILE)
    try:
        data = storage.read_many([FILE]).get(FILE)
    except Refused as error:
        raise InputError(str(error)) from error
    if data is None:
        return ()
    try:
        content = tomllib.loads(decoded(data, place))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{place} is no TOML: {error}") from error
    entries = content.pop("exclude", [])
    if content or not isinstance(entries, list):
        raise InputError(
            f"{place} has {', '.join(content) or 'exclude = ...'}; it holds [[exclude]] tables only"
        )
    return tuple(_entry(place, i, entry) for i, entry in enumerate(entries, start=1))


def _entry(place: str, number: int, entry: Any) -> Exclusion:
    here = f"{place}, [[exclude]] {number}"
    reason = entry.get("reason") if isinstance(entry, dict) else None
    if not isinstance(reason, str) or not reason.strip():
        raise InputError(f"{here} has no reason: say why in one line, reason = '...'")
    selectors = {name: value for name, value in entry.items() if name != "reason"}
    if not selectors:
        raise InputError(f"{here} selects nothing: name a trial, tokens or another column")
    for name, value in selectors.items():
        if name not in SELECTORS:
            raise InputError(f"{here} selects by {name!r}; the columns are {', '.join(SELECTORS)}")
        if not isinstance(value, str | int | float | bool):
            raise InputError(f"{here} has {name} = {value}: give one value, not a list or table")
    return Exclusion(reason=reason.strip(), selectors=selectors)


def rule_out(
    table: pa.Table, exclusions: tuple[Exclusion, ...]
) -> tuple[pa.Table, dict[str, int], list[str]]:
    """Take away the rows that are ruled out.

    Returns
    -------
    The rows that are left, how many went for which reason, and a sentence an entry that matches no
    row.
    """
    ruled = np.zeros(table.num_rows, dtype=bool)
    excluded: dict[str, int] = {}
    notes = []
    for entry in exclusions:
        chosen = np.ones(table.num_rows, dtype=bool)
        for name, value in entry.selectors.items():
            chosen &= _matches(table, name, value)
        if not chosen.any():
            notes.append(f"{FILE}: no observation has {entry}")
        fresh = int((chosen & ~ruled).sum())
        if fresh:
            reason = f"ruled out: {entry.reason}"
            excluded[reason] = excluded.get(reason, 0) + fresh
        ruled |= chosen
    return table.filter(pa.array(~ruled)), excluded, notes


def _matches(table: pa.Table, name: str, value: str | int | float | bool) -> np.ndarray:
    if name == "trial":
        found = pc.fill_null(pc.starts_with(table[name], str(value)), False)
    else:
        found = equals(table[name], str(value))
    return np.asarray(found.to_numpy(), dtype=bool)
