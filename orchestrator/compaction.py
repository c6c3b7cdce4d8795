"""compacted/: a copy of the ledger's rows in one file, for fast reading. Never the truth.

Contract: nothing here can lose or double a row. The rows' own files stay where they are and say
what is in the ledger; a copy is written whole before older ones are removed; whoever reads takes
a row once, from any copy, and from its own file where no copy that can be read has it. So crashes
at any moment, several compactors at once, and a copy that vanishes under a reader do no harm.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError
from analysis.files import read_parquet
from analysis.observations import SCHEMA, ObservationId, observation_ids
from orchestrator.storage import Storage

DIRECTORY = "compacted"
KEYS = ("trial", "tokens")


def read_copies(storage: Storage, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Rows of all copies, with `columns`; the same row may be in several.

    A damaged copy is left out with a warning, one that was just removed in silence.
    """
    names = [f"{DIRECTORY}/{name}" for name in copies(storage)]
    tables = [read_parquet([], columns)]
    for name, data in storage.read_many(names).items():
        try:
            tables.append(read_parquet([(storage.place(name), data)], columns))
        except InputError as error:
            warnings.warn(f"this copy of the ledger is ignored: {error}", stacklevel=2)
    return pa.concat_tables(tables)


def write_copy(storage: Storage, rows: pa.Table, *, older: Iterable[str]) -> str:
    """Write a copy of `rows`, the whole ledger, then remove `older` ones; returns its name.

    `older` are the copies that there were before the ledger was listed: what is in them is in
    `rows` too. One that another compactor has written since stays until the next compaction.
    """
    name = f"{_digest(observation_ids(rows))}.parquet"
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
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
