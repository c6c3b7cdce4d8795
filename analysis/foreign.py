"""Observations from somebody else's table: which column is what, and what is left out.

Units are doubted in `units.py`, files are read in `files.py`. Nothing is converted or guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.errors import InputError
from analysis.files import listed, numbers
from analysis.observations import FloatArray, IntArray, Observations
from analysis.units import doubts

NAMES = {
    "params": "n params parameters nparams nparameters numparams modelsize modelparams paramcount",
    "tokens": "d tokens ntokens numtokens trainingtokens traintokens tokenstrained datasettokens",
    "flops": "c flops flop trainingflops trainingflop trainflops totalflops compute "
    "trainingcompute",
    "loss": "l loss heldoutloss validationloss valloss evalloss testloss finalloss finalvalloss",
    "loss_stderr": "lossstderr lossse lossstandarderror",
    "budget": "budget budgetflops flopbudget flopsbudget nominalbudget nominalflops computebudget",
    "weight": "weight weights",
    "trunk": "trunk trunkid",
}
"""What each column may be called, in small letters and digits alone, where nobody says."""

_SYMBOLS = {"n": "params", "d": "tokens", "c": "flops", "l": "loss"}
_TRIO = ("params", "tokens", "flops")
_LETTERS = {"params": "N", "tokens": "D", "flops": "C", "loss": "L"}


_MANY, _KINDS = 5, 20  # rows of one value, and values, that make a column of words name kinds


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What somebody else's table says."""

    obs: Observations
    excluded: Mapping[str, int]
    """Rows left out, by reason."""
    notes: tuple[str, ...]
    """What was assumed and what is doubtful, a sentence each."""


def parse_columns(items: Sequence[str]) -> dict[str, str]:
    """Which column is what, as a person writes it: `params=Model Size,loss=loss`.

    Raises
    ------
    InputError
        If a part is no KEY=COLUMN, its key is unknown, or a key is given twice.

    Examples
    --------
    >>> parse_columns(['N=Model Size,C="Training FLOP"', "loss=loss"])
    {'params': 'Model Size', 'flops': 'Training FLOP', 'loss': 'loss'}
    """
    found: dict[str, str] = {}
    # A comma ends a column's name only where another KEY= follows.
    parts = re.split(r",(?=[^,=]+=)", ",".join(items)) if items else []
    for part in parts:
        key, equals, name = (text.strip() for text in part.partition("="))
        key = _SYMBOLS.get(key.lower(), key.lower())
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
            name = name[1:-1]
        if not equals or not name or name.endswith(","):
            raise InputError(f"--columns {part.strip()!r}: write KEY=COLUMN, such as params=size")
        if key not in NAMES:
            raise InputError(f"--columns {part.strip()!r}: the keys are {', '.join(NAMES)}")
        if found.setdefault(key, name) != name:
            raise InputError(f"--columns gives {key} twice, as {found[key]!r} and {name!r}")
    return found


def recognise(table: pa.Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Complete `columns` by common names.

    Where two of N, D and C are given the third is not looked for.

    Raises
    ------
    InputError
        If L or two of N, D and C are neither given nor recognised, or two columns could be one.
    """
    found = dict(columns)
    for name in found.values():
        if name not in table.column_names:
            raise InputError(f"there is no column {name!r}; the columns are {listed(table)}")
    taken = set(found.values())
    settled = _TRIO if sum(key in found for key in _TRIO) >= 2 else ()
    for key, names in NAMES.items():
        # A standard error of one loss says nothing of another that somebody chose.
        if key in found or key in settled or (key == "loss_stderr" and "loss" in columns):
            continue
        known = names.split()
        candidates = [c for c in table.column_names if _plain(c) in known and c not in taken]
        if len(candidates) > 1:
            either = " or ".join(f"{key}={name}" for name in candidates)
            raise InputError(f"several columns could be {key}: say which with --columns {either}")
        if candidates:
            found[key] = candidates[0]
    _require(table, found)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _require(table: pa.Table, found: Mapping[str, str]) -> None:
    have = [key for key in _TRIO if key in found or (key == "flops" and "budget" in found)]
    if "loss" in found and len(have) >= 2:
        return
    lacking = [_LETTERS[key] for key in _TRIO if key not in have]
    what = "the loss" if len(have) >= 2 else f"two of N, D and C (no {', no '.join(lacking)})"
    raise InputError(
        f"cannot tell which column is {what}: say so with "
        f"--columns params=...,flops=...,loss=...; the columns are {listed(table)}"
    )


def foreign(table: pa.Table, columns: Mapping[str, str]) -> Foreign:
    """View a table as (N, D, C, L), N as given, C as given or, where it is not, by 6ND.

    Parameters
    ----------
    table
        Any columns.
    columns
        Which of them is what, keys as in `NAMES`; those missing are recognised by common names.
        Of N, D and C, a third that is not there is from C = 6ND; without C, a nominal budget is C.

    Raises
    ------
    InputError
        If columns are missing or hold no numbers, or an N, D, C or L is not positive, or no row is
        left.

    Notes
    -----
    Exact repetitions of a row count once. A missing number leaves its row out.
    """
    known = recognise(table, columns)
    values = {key: numbers(table, name) for key, name in known.items() if key != "trunk"}
    kept, excluded = _rows(table, known, values)
    values = {key: value[kept] for key, value in values.items()}
    _require_positive(values, known, kept)
    n, d, c = _trio(values)
    read = {"flops": known["budget"], **known} if "budget" in known else known
    notes = _assumed(known, columns) + doubts(n, d, c, values["loss"], read)
    nan = np.full(len(n), np.nan)
    obs = Observations(
        params=n,
        tokens=d,
        flops=c,
        loss=values["loss"],
        loss_stderr=values.get("loss_stderr", nan),
        budget=values.get("budget", nan),
        params_convention="given",
        flops_convention="given" if "flops" in known or "budget" in known else "6nd",
        weight=values.get("weight", np.ones(len(n))),
        trunk=_trunks(table, known.get("trunk"), kept),
    )
    return Foreign(obs=obs, excluded=excluded, notes=tuple(notes))


def _rows(
    table: pa.Table, known: Mapping[str, str], values: Mapping[str, FloatArray]
) -> tuple[np.ndarray, dict[str, int]]:
    """Which rows have all numbers and are no repetition, shape (n,), and how many have not."""
    kept = np.ones(table.num_rows, dtype=bool)
    excluded: dict[str, int] = {}
    needed = _TRIO if {"params", "tokens"} <= set(known) or "flops" in known else (*_TRIO, "budget")
    for key in (*needed, "loss", "weight"):
        if key in values:
            missing = kept & ~np.isfinite(values[key])
            kept &= ~missing
            if missing.any():
                excluded[f"missing or not a finite number in {known[key]!r}"] = int(missing.sum())
    repeated = kept & ~_first_of_equals(table, list(values.values()))
    if repeated.any():
        excluded["exact duplicate of another row"] = int(repeated.sum())
    kept &= ~repeated
    if not kept.any():
        raise InputError(f"none of {table.num_rows} rows is complete: {', '.join(excluded)}")
    return kept, excluded


def _first_of_equals(table: pa.Table, values: Sequence[FloatArray]) -> np.ndarray:
    """Which rows are the first of their content, over all columns, shape (n,)."""
    # Hashes of the numbers find the few rows that may be equal; only those are compared in full.
    mixed = np.zeros(table.num_rows, dtype=np.uint64)
    for value in values:
        mixed ^= np.ascontiguousarray(value).view(np.uint64)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    ordered = np.sort(mixed)
    first = np.ones(table.num_rows, dtype=bool)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated) == 0:
        return first
    at = np.flatnonzero(np.isin(mixed, repeated))
    flat = [i for i, field in enumerate(table.schema) if not pa.types.is_nested(field.type)]
    few = table.select(flat).take(pa.array(at))
    keys = [f"{i}" for i in range(few.num_columns)]  # names may repeat in somebody's table
    few = few.rename_columns(keys).append_column("row", pa.array(at))
    firsts = few.group_by(keys).aggregate([("row", "min")])["row_min"].to_numpy()
    first[at] = False
    first[firsts] = True
    return first


def _require_positive(
    values: Mapping[str, FloatArray], known: Mapping[str, str], kept: np.ndarray
) -> None:
    for key, value in values.items():
        signed = key in ("weight", "loss_stderr")
        bad = value < 0 if signed else value <= 0
        if bad.any():
            first = int(np.argmax(bad))
            row = int(np.flatnonzero(kept)[first]) + 1
            raise InputError(
                f"{bad.sum()} of {len(value)} rows have a {_LETTERS.get(key, key)} "
                f"({known[key]!r}) that is {'negative' if signed else 'not positive'}, the first "
                f"is {value[first]:g} in row {row}: correct or remove them"
            )


def _trio(values: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """N, D and C, the missing one from C = 6ND; C of a row of a budget is that budget."""
    n, d = values.get("params"), values.get("tokens")
    c = values.get("flops", values.get("budget"))
    if n is not None and d is not None:
        by_sixes = 6.0 * n * d
        return n, d, by_sixes if c is None else np.where(np.isfinite(c), c, by_sixes)
    assert c is not None, "two of N, D and C are known"
    if n is not None:
        return n, c / (6.0 * n), c
    assert d is not None, "two of N, D and C are known"
    return c / (6.0 * d), d, c


def _assumed(known: Mapping[str, str], columns: Mapping[str, str]) -> list[str]:
    """What nobody said: columns known by their names, and C taken from the budget."""
    by_name = [f"{_LETTERS.get(k, k)} is {name!r}" for k, name in known.items() if k not in columns]
    notes = [f"columns known by their names: {', '.join(by_name)}"] if by_name else []
    if "flops" not in known and "budget" in known:
        notes.append(f"C is taken to be the nominal budget, {known['budget']!r}")
    return notes


def _trunks(table: pa.Table, name: str | None, kept: np.ndarray) -> IntArray:
    """Labels of the rows that share noise, shape (n,); a row without one stands alone."""
    if name is None:
        return np.arange(int(kept.sum()), dtype=np.int64)
    column = table[name].combine_chunks().filter(pa.array(kept)).dictionary_encode()
    alone = -1 - np.arange(len(column), dtype=np.int64)
    codes = pc.fill_null(column.indices, 0).to_numpy()
    return np.where(pc.is_null(column).to_numpy(zero_copy_only=False), alone, codes)


def mixed(table: pa.Table) -> list[str]:
    """Say of columns of words with few values that their runs may be of several kinds."""
    found = []
    for name in table.column_names:
        if not pa.types.is_string(table.schema.field(name).type):
            continue
        values = pc.value_counts(pc.drop_null(table[name])).to_pylist()
        often = [str(item["values"]) for item in values if item["counts"] >= _MANY]
        if len(often) > 1 and len(values) <= _KINDS:
            found.append(
                f"{name!r} has {len(values)} values ({', '.join(often)}): are these runs of one "
                f"kind? If not, select with --where {name}={often[0]}"
            )
    return found
