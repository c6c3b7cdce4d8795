"""The ledger: one write-once Parquet file an observation."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError
from analysis.files import read_parquet
from analysis.observations import SCHEMA, SCHEMA_VERSION, ObservationId, observation_ids
from orchestrator.compaction import KEYS, copies, read_copies, write_copy
from orchestrator.storage import Storage
from trainers.flops import flops_per_token, params
from trainers.shape import DIMENSIONS
from trainers.simulated import CONDUCT
from trainers.trial import Measurement, Trial

DIRECTORY = "ledger"
FEW = 50
"""Rows that are read from their own files: a copy of all is slower for so few."""
WORTHWHILE = 100
"""Rows that no copy has from which on, if they are a tenth of all too, a new one pays."""


class Ledger:
    """Every observation of a project, in `ledger/` of its storage. The truth.

    Contract: `write` is atomic and create-if-absent, so that any number of processes may write at
    once, each observation ends as exactly one row, the first to arrive, and a reader or a crash
    never sees half of one. A row is never changed or removed. A row that `write` has returned from
    survives the death of every process. The process that measured writes. A copy for fast reading
    (`compact`) changes none of this: see `compaction.py`.
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
        name = _file_name((row["trial"], row["tokens"]))
        return self.storage.create(name, buffer.getvalue())

    def find(self, name: ObservationId) -> dict[str, Any] | None:
        """One observation's row, if it has been measured."""
        rows = self._own_files([name]).to_pylist()
        return dict(rows[0]) if rows else None

    def ids(self) -> set[ObservationId]:
        """Names of what has been measured; reads only file names."""
        return set(self._ids())

    def read(
        self, only: Collection[ObservationId] | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """All rows, or `only` those, in order of name; all of `SCHEMA`, or those `columns`.

        Raises
        ------
        InputError
            If a file is cut short or foreign.
        """
        chosen = None if only is None else set(only)
        ids = [name for name in self._ids() if chosen is None or name in chosen]
        wanted = list(SCHEMA.names if columns is None else columns)
        needed = [*wanted, *(key for key in KEYS if key not in wanted)]
        table = read_copies(self.storage, needed) if len(ids) > FEW else read_parquet([], needed)
        known = set(observation_ids(table))
        table = pa.concat_tables(
            [table, self._own_files([name for name in ids if name not in known], needed)]
        )
        # The first of several copies of a row; `ids` leaves out what is in the ledger no more.
        at = {name: i for i, name in reversed([*enumerate(observation_ids(table))])}
        order = pa.array([at[name] for name in ids if name in at], pa.int64())
        return table.take(order).select(wanted)

    def compact(self, rows: pa.Table | None = None) -> str:
        """Copy all rows into one file for fast reading; returns its name in `compacted/`.

        `rows` are all, where the caller has just read them, and nobody else may have compacted.
        """
        older = copies(self.storage)
        return write_copy(self.storage, self.read() if rows is None else rows, older=older)

    def compact_if_worthwhile(self, rows: pa.Table | None = None) -> bool:
        """Compact if many rows are in no copy; whether that was done. `rows` as for `compact`."""
        ids = self.ids()
        if len(ids) <= WORTHWHILE:
            return False
        fresh = ids.difference(observation_ids(read_copies(self.storage, KEYS)))
        if len(fresh) <= max(WORTHWHILE, len(ids) / 10):
            return False
        self.compact(rows)
        return True

    def _ids(self) -> list[ObservationId]:
        names = self.storage.names(DIRECTORY)
        return [self._parse(name) for name in names if name.endswith(".parquet")]

    def _parse(self, file_name: str) -> ObservationId:
        try:
            key, tokens = file_name.removesuffix(".parquet").rsplit("-", 1)
            return key, int(tokens)
        except ValueError as error:
            place = self.storage.place(f"{DIRECTORY}/{file_name}")
            raise InputError(f"{place} is no file of a ledger: move it elsewhere") from error

    def _own_files(
        self, ids: Iterable[ObservationId], columns: Sequence[str] | None = None
    ) -> pa.Table:
        read = self.storage.read_many(map(_file_name, ids))
        return read_parquet(
            ((self.storage.place(name), data) for name, data in read.items()), columns
        )


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


def _file_name(name: ObservationId) -> str:
    return f"{DIRECTORY}/{name[0]}-{name[1]}.parquet"


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
        **{f"params_{convention}": count for convention, count in counted.items()},
        "flops_exact": flops,
        "flops_6nd": 6.0 * counted["non_embedding"] * measurement.tokens,
        "flops_spent": spent,
        "loss": measurement.loss,
        "loss_stderr": measurement.loss_stderr,
        "bits_per_byte": measurement.bits_per_byte,
        **{name: getattr(trial.shape, name) for name in DIMENSIONS},
        "batch_tokens": trial.hyperparameters.batch_tokens,
        "learning_rate": trial.hyperparameters.matrix_rate,
        "precision": trial.hyperparameters.precision,
        "trunk": trial.key if trial.horizons else None,
        "probe_rate": trial.probe and trial.probe.rate,
        "probe_batch": trial.probe and trial.probe.batch,
        "schedule": trial.hyperparameters.schedule,
        "recipe": trial.recipe.name,
        "recipe_hash": trial.recipe.hash,
        "trainer": _trainer_name(trial),
        "corpus": trial.corpus.name,
        "corpus_hash": trial.corpus.combined_hash,
        "seed": trial.seed,
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
