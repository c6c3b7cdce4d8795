"""The ledger: one write-once Parquet file an observation, and one record a failed attempt."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError
from analysis.observations import SCHEMA, SCHEMA_VERSION, ObservationId, read_parquet
from trainers.flops import flops_per_token, params
from trainers.trial import Measurement, Trial

WORKER_DIED = "the worker process died"
"""Error of an attempt that could leave no record of its own."""


class Ledger:
    """Every observation of a project, in `<project>/ledger/`. The truth.

    Contract: `write` is atomic and create-if-absent, so that any number of processes may write at
    once, each observation ends as exactly one row, the first to arrive, and a reader or a crash
    never sees half of one. A row is never changed or removed. A row that `write` has returned from
    survives the death of every process (it is synced to disk). The process that measured writes.
    """

    def __init__(self, project: Path) -> None:
        self.directory = project / "ledger"
        self.attempts = project / "attempts"

    def write(self, trial: Trial, measurement: Measurement) -> bool:
        """Record an observation. False if it was there already: the first one stays."""
        return self.write_row(_row(trial, measurement))

    def write_row(self, row: dict[str, Any]) -> bool:
        """Record a row of `SCHEMA`, with the same promises; columns that it lacks are null."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / _file_name((row["trial"], row["tokens"]))
        temporary = self.directory / f".{final.name}.{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), file)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, final)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(self.directory)
        return True

    def find(self, name: ObservationId) -> dict[str, Any] | None:
        """One observation's row, if it has been measured."""
        path = self.directory / _file_name(name)
        return dict(read_parquet([path]).to_pylist()[0]) if path.exists() else None

    def ids(self) -> set[ObservationId]:
        """Names of what has been measured; reads only file names."""
        return {_observation_id(path) for path in self.files()}

    def files(self) -> list[Path]:
        """Its Parquet files, in order of name."""
        return sorted(self.directory.glob("[!.]*.parquet"))

    def read(self, only: set[ObservationId] | None = None) -> pa.Table:
        """All rows, or `only` those.

        Raises
        ------
        InputError
            If a file is cut short or foreign.
        """
        return read_parquet(
            [path for path in self.files() if only is None or _observation_id(path) in only]
        )

    def record_failure(self, trial: Trial, error: str, traceback: str) -> None:
        """Keep a failed attempt's reason in `<project>/attempts/`."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        record = {
            "trial": trial.key,
            "tokens": trial.tokens,
            "error": error,
            "traceback": traceback,
            "failed_at": datetime.now(UTC).isoformat(),
        }
        path = self.attempts / f"{trial.key}-{uuid.uuid4().hex[:8]}.json"
        write_text(path, json.dumps(record, indent=1))

    def raised(self, key: str, *, since: str) -> int:
        """Attempts of a trial that raised, since a time in ISO format."""
        return sum(
            record["trial"] == key and record["failed_at"] >= since
            for record in self.failures()
            if record["error"] != WORKER_DIED
        )

    def failures(self) -> list[dict[str, Any]]:
        """All records of failed attempts, oldest first."""
        records = [read_json(path) for path in self.attempts.glob("*.json")]
        return sorted(records, key=lambda record: str(record["failed_at"]))


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: a crash leaves the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a record of a project.

    Raises
    ------
    InputError
        If it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): move it away and run again") from error


def _sync_directory(directory: Path) -> None:
    """Make a new name in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _trainer_name(trial: Trial) -> str:
    """Trainer and version; for a simulation also which truth, since truths do not mix."""
    name = f"{trial.trainer}-{trial.trainer_version}"
    truth = [pair for pair in trial.settings if pair[0] not in ("seconds", "fail", "diverge")]
    if not truth:
        return name
    return f"{name}-{hashlib.sha256(repr(truth).encode()).hexdigest()[:8]}"


def _file_name(name: ObservationId) -> str:
    return f"{name[0]}-{name[1]}.parquet"


def _observation_id(path: Path) -> ObservationId:
    try:
        key, tokens = path.stem.rsplit("-", 1)
        return key, int(tokens)
    except ValueError as error:
        raise InputError(f"{path} is no file of a ledger: move it elsewhere") from error


def _row(trial: Trial, measurement: Measurement) -> dict[str, Any]:
    """One row of `SCHEMA`."""
    counted = params(trial.shape)
    flops = flops_per_token(trial.shape) * measurement.tokens
    return {
        "trial": trial.key,
        "tokens": measurement.tokens,
        "status": measurement.status,
        "reason": measurement.reason,
        "params_non_embedding": counted.non_embedding,
        "params_matmul": counted.matmul,
        "params_total": counted.total,
        "flops_exact": flops,
        "flops_6nd": 6.0 * counted.non_embedding * measurement.tokens,
        "flops_spent": measurement.curve[-1].flops if measurement.curve else flops,
        "loss": measurement.loss,
        "loss_stderr": measurement.loss_stderr,
        "bits_per_byte": measurement.bits_per_byte,
        **asdict(trial.shape),
        "batch_tokens": trial.hyperparameters.batch_tokens,
        "learning_rate": trial.hyperparameters.matrix_rate,
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
        "curve": [asdict(point) for point in measurement.curve],
        "versions": json.dumps(measurement.versions),
        "finished_at": datetime.now(UTC),
        "schema_version": SCHEMA_VERSION,
    }
