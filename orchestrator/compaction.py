"""compacted/: a copy of the ledger's rows in one file, for fast reading. Never the truth.

Contract: nothing here can lose, double or override a row. The rows' own files stay where they are
and say what is in the ledger; a copy is written whole before older ones are removed; whoever reads
takes a row once, from a copy if the copy carries the mark of the row's own file as it is now, and
else from that file. So crashes at any moment, several compactors at once, a copy that vanishes
under a reader and one of another project do no harm. That the numbers of a copy are those of the
rows is what `verify.py` checks: whoever reads would have to read every row for it.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError, PlainWarning
from analysis.files import read_parquet
from analysis.observations import SCHEMA, ObservationId, observation_ids
from orchestrator.storage import Storage

DIRECTORY = "compacted"
KEYS = ("trial", "tokens")
MARK = "file_mark"
"""Column of a copy: what `Storage.marks` said of the row's own file."""
_MARK_FIELD = pa.field(MARK, pa.string())


class CopyWarning(PlainWarning):
    """A copy of the ledger is not used, or not all of it."""


def read_copies(storage: Storage, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Rows of all copies, with `columns` and the column `MARK`; the same row may be in several.

    A copy that is damaged, or that has no marks since an earlier version wrote it, is left out with
    a warning, one that was just removed in silence.
    """
    names = [f"{DIRECTORY}/{name}" for name in copies(storage)]
    tables = [read_parquet([], columns).append_column(_MARK_FIELD, pa.array([], pa.string()))]
    for name, data in storage.read_many(names).items():
        try:
            tables.append(read_copy(storage.place(name), data, columns))
        except InputError as error:
            warnings.warn(f"this copy of the ledger is ignored: {error}", CopyWarning, stacklevel=2)
    return pa.concat_tables(tables)


def read_copy(place: str, data: bytes, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Return the rows of one copy, with `columns` and the column `MARK`.

    Raises
    ------
    InputError
        If it is damaged or has no marks.
    """
    table = read_parquet([(place, data)], columns)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        if MARK not in file.schema_arrow.names:
            raise InputError(
                f"{place} is of an earlier version and has no marks of the rows' own files; these "
                "are read instead, which is slower, until isoflop run with one of the project's "
                "sweeps (such as plans/NAME.toml in it) writes a new copy"
            )
        marks = file.read([MARK], use_threads=False)[MARK].cast(pa.string())
    return table.append_column(_MARK_FIELD, marks)


def current_rows(
    storage: Storage, copied: pa.Table, marks: Mapping[ObservationId, str]
) -> pa.Table:
    """Return those of the copied rows whose own files are as they were when they were copied."""
    names = observation_ids(copied)
    told = zip(names, copied[MARK].to_pylist(), strict=True)
    current = [mark is not None and marks.get(name) == mark for name, mark in told]
    others = {name for name, same in zip(names, current, strict=True) if not same} & marks.keys()
    lacking = others - {name for name, same in zip(names, current, strict=True) if same}
    if lacking:
        warnings.warn(
            f"{storage.place(DIRECTORY)} has copies of {len(lacking)} rows whose own files are not "
            "the ones that were copied; the files are read instead: isoflop verify says more, and "
            "the directory may be removed",
            CopyWarning,
            stacklevel=2,
        )
    return copied.filter(pa.array(current, pa.bool_())).drop_columns([MARK])


def write_copy(
    storage: Storage, rows: pa.Table, marks: Mapping[ObservationId, str], *, older: Iterable[str]
) -> str:
    """Write a copy of `rows`, the whole ledger, then remove `older` ones; returns its name.

    `marks` are those of the rows' own files. `older` are the copies that there were before the
    ledger was listed: what is in them is in `rows` too. One that another compactor has written
    since stays until the next compaction.
    """
    names = observation_ids(rows)
    name = f"{_digest(names)}.parquet"
    buffer = io.BytesIO()
    column = pa.array([marks.get(row) for row in names], pa.string())
    pq.write_table(rows.append_column(_MARK_FIELD, column), buffer)
    # In place of one of that name, which has the same rows but may be damaged.
    storage.replace(f"{DIRECTORY}/{name}", buffer.getvalue())
    for other in set(older) - {name}:
        storage.remove(f"{DIRECTORY}/{other}")
    return name


def copies(storage: Storage) -> list[str]:
    """Names of the copies that there are: one, or several for a moment."""
    return [name for name in storage.names(DIRECTORY) if name.endswith(".parquet")]


def _digest(names: Iterable[ObservationId]) -> str:
    text = "\n".join(f"{key}-{tokens}" for key, tokens in sorted(names))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
