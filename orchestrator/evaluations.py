"""evaluations/: what finished models scored in tasks, one Parquet file a model and task.

Contract: `write` is atomic, and the newest evaluation of one model by one task, with as many
examples and questions, takes the place of the one before. Nothing here changes the ledger.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import InputError
from analysis.observations import ObservationId
from orchestrator.runs import plain
from orchestrator.storage import Storage

if TYPE_CHECKING:
    from trainers.scoring import TaskScore

DIRECTORY = "evaluations"
SCHEMA = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False, metadata={"unit": "tokens"}),
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_version", pa.string()),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("filter", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("stderr", pa.float64()),
        pa.field("higher_is_better", pa.bool_()),
        pa.field("num_fewshot", pa.int64()),
        pa.field("documents", pa.int64()),
        pa.field("limit", pa.int64()),
        pa.field("harness", pa.string(), nullable=False),
        pa.field("device", pa.string()),
        pa.field("finished_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""One row a metric. `limit` is how many questions of a task were asked; null is all of them."""


def write(
    storage: Storage,
    name: ObservationId,
    scores: Iterable[TaskScore],
    *,
    limit: int | None,
    harness: str,
    device: str,
) -> pa.Table:
    """Keep what a model scored; returns the rows."""
    same = {
        "trial": name[0],
        "tokens": name[1],
        "limit": limit,
        "harness": harness,
        "device": device,
        "finished_at": datetime.now(UTC),
    }
    rows = [asdict(score) | same for score in scores]
    for _, group in groupby(rows, key=_file_name):
        own = list(group)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(own, schema=SCHEMA), buffer)
        storage.replace(_file_name(own[0]), buffer.getvalue())
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def read(storage: Storage) -> pa.Table:
    """All that is kept, in order of file names.

    Raises
    ------
    InputError
        If a file is damaged or foreign.
    """
    names = [n for n in storage.names(DIRECTORY) if n.endswith(".parquet")]
    tables = [SCHEMA.empty_table()]
    for name, data in storage.read_many(f"{DIRECTORY}/{name}" for name in names).items():
        try:
            tables.append(pq.read_table(io.BytesIO(data)).select(SCHEMA.names).cast(SCHEMA))
        except (pa.ArrowException, KeyError) as error:
            raise InputError(
                f"{storage.place(name)} is damaged or no evaluation ({error}): move it away"
            ) from error
    return pa.concat_tables(tables)


def points(storage: Storage) -> dict[ObservationId, list[tuple[str, float, int]]]:
    """As MLflow's metrics, by model: name, value, time in milliseconds; finite ones only."""
    found: dict[ObservationId, list[tuple[str, float, int]]] = {}
    for row in read(storage).to_pylist():
        at = int(row["finished_at"].timestamp() * 1000)
        own = found.setdefault((row["trial"], row["tokens"]), [])
        for suffix, value in (("", row["value"]), (" stderr", row["stderr"])):
            if value is not None and math.isfinite(value):
                own.append((metric_name(row) + suffix, value, at))
    return found


def metric_name(row: Mapping[str, Any]) -> str:
    """What a score is called in MLflow, which takes few signs.

    Examples
    --------
    >>> row = {"task": "hellaswag", "metric": "acc", "filter": "none", "num_fewshot": 5}
    >>> metric_name(row | {"limit": None})
    'eval/hellaswag/5-shot/acc'
    """
    parts = ["eval", row["task"]]
    parts += [f"{row['num_fewshot']}-shot"] if row["num_fewshot"] is not None else []
    parts += [f"first {row['limit']}"] if row["limit"] is not None else []
    parts += [row["metric"]] + ([row["filter"]] if row["filter"] != "none" else [])
    return plain("/".join(parts))


def _file_name(row: Mapping[str, Any]) -> str:
    what = [row[part] for part in ("task", "num_fewshot", "limit")]
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return f"{DIRECTORY}/{row['trial']}-{row['tokens']}-{digest}.parquet"
