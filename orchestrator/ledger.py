"""The ledger: one write-once Parquet file an observation."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError
from analysis.files import read_parquet, read_parquet_file
from analysis.observations import SCHEMA, SCHEMA_VERSION, ObservationId, observation_ids
from orchestrator.compaction import KEYS, copies, current_rows, read_copies, write_copy
from orchestrator.records import LeftOut
from orchestrator.storage import Storage
from trainers.flops import flops_per_token, params
from trainers.shape import DIMENSIONS
from trainers.simulated import CONDUCT
from trainers.trial import Measurement, Trial

DIRECTORY = "ledger"
DIGITS = 18
"""Most digits of a horizon in a file's name, so that it is a 64-bit number."""
FEW = 50
"""Rows that are read from their own files: a copy of all is slower for so few."""
WORTHWHILE = 100
"""Rows that no copy has from which on, if they are a tenth of all too, a new one pays."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a ledger that could be read, and the files that were left out."""

    table: pa.Table
    """One row an observation, in order of its name."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that are damaged, foreign, or not of the observation that their name says."""


class Ledger:
    """Every observation of a project, in `ledger/` of its storage. The truth.

    Contract: `write` is atomic and create-if-absent, so that any number of processes may write at
    once, each observation ends as exactly one row, the first to arrive, and a reader or a crash
    never sees half of one. A row is never changed or removed. A row that `write` has returned from
    survives the death of every process. The process that measured writes. A file has the one row
    that its name says; any other file is no row. A copy for fast reading (`compact`) changes none
    of this: see `compaction.py`.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def write(self, trial: Trial, measurement: Measurement) -> bool:
        """Record an observation. False if it was there already: the first one stays."""
        return self.write_row(_row(trial, measurement))

    def write_row(self, row: dict[str, Any]) -> bool:
        """Record a row of `SCHEMA`, with the same promises; columns that it lacks are null."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), buffer)
        name = file_name((row["trial"], row["tokens"]))
        return self.storage.create(name, buffer.getvalue())

    def find(self, name: ObservationId) -> dict[str, Any] | None:
        """One observation's row, if it has been measured.

        Raises
        ------
        InputError
            If its file is cut short, foreign, or of another observation.
        """
        tables, left_out = self._own_files([name])
        _refuse(left_out)
        return dict(tables[0].to_pylist()[0]) if tables else None

    def ids(self) -> set[ObservationId]:
        """Names of what has been measured; reads only file names, and passes over foreign ones."""
        return set(self._ids()[0])

    def read(
        self, only: Collection[ObservationId] | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """All rows, or `only` those, in order of name; all of `SCHEMA`, or those `columns`.

        Raises
        ------
        InputError
            If a file is cut short, foreign, or of another observation than its name says.
        """
        rows = self.survey(only, columns)
        _refuse(rows.left_out)
        return rows.table

    def survey(
        self, only: Collection[ObservationId] | None = None, columns: Sequence[str] | None = None
    ) -> Rows:
        """Return what `read` does, but leave out files that cannot be used, each with a reason."""
        chosen = None if only is None else set(only)
        every, left_out = self._ids()
        ids = [name for name in every if chosen is None or name in chosen]
        wanted = list(SCHEMA.names if columns is None else columns)
        needed = [*wanted, *(key for key in KEYS if key not in wanted)]
        table = self._copied(ids, needed) if len(ids) > FEW else read_parquet([], needed)
        known = set(observation_ids(table))
        tables, odd = self._own_files([name for name in ids if name not in known], needed)
        table = pa.concat_tables([table, *tables])
        # The first of several copies of a row; `ids` leaves out what is in the ledger no more.
        at = {name: i for i, name in reversed([*enumerate(observation_ids(table))])}
        order = pa.array([at[name] for name in ids if name in at], pa.int64())
        return Rows(table=table.take(order).select(wanted), left_out=(*left_out, *odd))

    def compact(self, rows: pa.Table | None = None) -> str:
        """Copy all rows into one file for fast reading; returns its name in `compacted/`.

        `rows` are all, where the caller has just read them, and nobody else may have compacted.
        """
        older = copies(self.storage)
        rows = self.read() if rows is None else rows
        return write_copy(self.storage, rows, self._marks(observation_ids(rows)), older=older)

    def compact_if_worthwhile(self, rows: pa.Table | None = None) -> bool:
        """Compact if many rows are in no copy; whether that was done. `rows` as for `compact`."""
        ids = self.ids()
        if len(ids) <= WORTHWHILE:
            return False
        fresh = ids.difference(observation_ids(self._copied(ids, KEYS)))
        if len(fresh) <= max(WORTHWHILE, len(ids) / 10):
            return False
        self.compact(rows)
        return True

    def _ids(self) -> tuple[list[ObservationId], list[LeftOut]]:
        ids, left_out = [], []
        for name in self.storage.names(DIRECTORY):
            if not name.endswith(".parquet"):
                continue
            parsed = parse_name(name)
            if parsed is not None:
                ids.append(parsed)
            else:
                file = f"{DIRECTORY}/{name}"
                reason = f"{self.storage.place(file)} is no file of a ledger: move it elsewhere"
                left_out.append(LeftOut(file=file, reason=reason))
        return ids, left_out

    def _copied(self, ids: Collection[ObservationId], columns: Sequence[str]) -> pa.Table:
        """Return the rows of copies whose own files are as they were when they were copied."""
        copied = read_copies(self.storage, columns)
        if copied.num_rows == 0:
            return read_parquet([], columns)
        there = set(ids).intersection(observation_ids(copied))
        return current_rows(self.storage, copied, self._marks(there))

    def _marks(self, ids: Collection[ObservationId]) -> dict[ObservationId, str]:
        names = {file_name(name).removeprefix(f"{DIRECTORY}/"): name for name in ids}
        marks = self.storage.marks(DIRECTORY, names.keys())
        return {names[file]: mark for file, mark in marks.items()}

    def _own_files(
        self, ids: Iterable[ObservationId], columns: Sequence[str] | None = None
    ) -> tuple[list[pa.Table], list[LeftOut]]:
        names = {file_name(name): name for name in ids}
        tables, left_out = [], []
        for file, data in self.storage.read_many(names).items():
            try:
                tables.append(read_row(self.storage.place(file), data, names[file], columns))
            except InputError as error:
                left_out.append(LeftOut(file=file, reason=str(error)))
        return tables, left_out


def read_row(
    place: str, data: bytes, name: ObservationId, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the one row of a ledger's file, with the `columns` of which some are its name.

    Raises
    ------
    InputError
        If the file is cut short or foreign, or has another row or several.
    """
    table = read_parquet_file(place, data, columns)
    rows = observation_ids(table)
    if rows != [name]:
        content = f"the row of {rows[0][0]} at {rows[0][1]} tokens" if len(rows) == 1 else None
        raise InputError(
            f"{place} has {content or f'{len(rows)} rows'}, not the one row that its name says: it "
            "was changed or renamed; move it away and run the sweep again to measure it anew"
        )
    return table


def parse_name(name: str) -> ObservationId | None:
    """Return which observation a bare file name is of; None where it is no name of a row's file."""
    key, _, tokens = name.removesuffix(".parquet").rpartition("-")
    if not key or not tokens.isdecimal() or len(tokens) > DIGITS:
        return None
    parsed = key, int(tokens)
    return parsed if file_name(parsed) == f"{DIRECTORY}/{name}" else None


def row_of(file: str) -> ObservationId | None:
    """Return which observation a file of a project is named after; None where it is no row's."""
    directory, _, name = file.rpartition("/")
    return parse_name(name) if directory == DIRECTORY else None


def _refuse(left_out: Sequence[LeftOut]) -> None:
    if left_out:
        raise InputError(left_out[0].reason)


def _trainer_name(trial: Trial) -> str:
    """Trainer and version; also which truth or which command, since neither's losses mix."""
    name = f"{trial.trainer}-{trial.trainer_version}"
    if trial.command is not None:
        return f"{name}-{trial.command.hash[:8]}"
    truth = [pair for pair in trial.settings if pair[0] not in CONDUCT]
    if not truth:
        return name
    return f"{name}-{hashlib.sha256(repr(truth).encode()).hexdigest()[:8]}"


def _loss_step(trial: Trial, measurement: Measurement) -> int | None:
    if measurement.loss is None:
        return None
    return measurement.loss_step or measurement.tokens // trial.hyperparameters.batch_tokens


def file_name(name: ObservationId) -> str:
    """Return where the file of a row is, in the project's storage."""
    return f"{DIRECTORY}/{name[0]}-{name[1]}.parquet"


OF_TRIAL = (
    *("params_non_embedding", "params_matmul", "params_total", "flops_exact", "flops_6nd"),
    *DIMENSIONS,
    *("batch_tokens", "learning_rate", "precision", "probe_rate", "probe_batch", "schedule"),
    *("trainer", "corpus_hash", "seed"),
)
"""Columns that follow from what enters a trial's key."""
_COUNTED = OF_TRIAL[:5]


def of_trial(trial: Trial, tokens: int) -> dict[str, Any]:
    """Return those columns of a row that follow from its trial alone.

    Of a command's, without parameters and FLOPs: its program may count them itself.
    """
    counted = asdict(params(trial.shape))
    flops = flops_per_token(trial.shape) * tokens
    columns = {
        **{f"params_{convention}": count for convention, count in counted.items()},
        "flops_exact": flops,
        "flops_6nd": 6.0 * counted["non_embedding"] * tokens,
        **{name: getattr(trial.shape, name) for name in DIMENSIONS},
        "batch_tokens": trial.hyperparameters.batch_tokens,
        "learning_rate": trial.hyperparameters.matrix_rate,
        "precision": trial.hyperparameters.precision,
        "probe_rate": trial.probe and trial.probe.rate,
        "probe_batch": trial.probe and trial.probe.batch,
        "schedule": trial.hyperparameters.schedule,
        "trainer": _trainer_name(trial),
        "corpus_hash": trial.corpus.combined_hash,
        "seed": trial.seed,
    }
    left = () if trial.command is None else _COUNTED
    return {name: value for name, value in columns.items() if name not in left}


def _row(trial: Trial, measurement: Measurement) -> dict[str, Any]:
    """One row of `SCHEMA`."""
    counted = {**asdict(params(trial.shape)), **(measurement.params or {})}
    flops = measurement.flops or flops_per_token(trial.shape) * measurement.tokens
    complete = measurement.status == "complete" or not measurement.curve
    spent = measurement.flops_spent
    if spent is None:
        spent = flops if complete else measurement.curve[-1].flops
    return {
        "trial": trial.key,
        "tokens": measurement.tokens,
        "status": measurement.status,
        "reason": measurement.reason,
        **of_trial(trial, measurement.tokens),
        **{f"params_{convention}": count for convention, count in counted.items()},
        "flops_exact": flops,
        "flops_6nd": 6.0 * counted["non_embedding"] * measurement.tokens,
        "flops_spent": spent,
        "loss": measurement.loss,
        "loss_stderr": measurement.loss_stderr,
        "bits_per_byte": measurement.bits_per_byte,
        "trunk": trial.key if trial.horizons else None,
        "recipe": trial.recipe.name,
        "recipe_hash": trial.recipe.hash,
        "corpus": trial.corpus.name,
        "seconds": measurement.seconds,
        "device": measurement.device,
        "mfu": measurement.mfu,
        "domains": [asdict(domain) for domain in measurement.domains],
        "curve": [asdict(point) for point in measurement.curve],
        "versions": json.dumps(measurement.versions),
        "resumed_from": measurement.resumed_from,
        "loss_step": _loss_step(trial, measurement),
        "compile_seconds": measurement.compile_seconds,
        "finished_at": datetime.now(UTC),
        "schema_version": SCHEMA_VERSION,
    }
