"""The observation table: schema with units, reading, choosing one kind, and the (N, D, C, L) view.

Where observations come from is of no interest here; `orchestrator/ledger.py` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.errors import InputError

FloatArray = NDArray[np.float64]
ParamsConvention = Literal["non_embedding", "matmul", "total"]
FlopsConvention = Literal["exact", "6nd"]
ObservationId = tuple[str, int]
"""(trial key, tokens): the name of one observation."""

SCHEMA_VERSION = 1

_CURVE = pa.list_(
    pa.struct(
        [
            pa.field("step", pa.int64()),
            pa.field("tokens", pa.int64()),
            pa.field("flops", pa.float64()),
            pa.field("train_loss", pa.float64()),
            pa.field("heldout_loss", pa.float64()),
        ]
    )
)


def _column(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit})


SCHEMA = pa.schema(
    [
        _column("trial", pa.string(), "key: hash of the trial's resolved content"),
        _column("tokens", pa.int64(), "tokens"),
        _column("status", pa.string(), "complete or diverged"),
        _column("reason", pa.string(), "why it diverged, else null"),
        _column("params_non_embedding", pa.int64(), "parameters"),
        _column("params_matmul", pa.int64(), "parameters"),
        _column("params_total", pa.int64(), "parameters"),
        _column("flops_exact", pa.float64(), "FLOPs"),
        _column("flops_6nd", pa.float64(), "FLOPs, 6 N D with N non-embedding"),
        _column("flops_spent", pa.float64(), "FLOPs, marginal cost of this row"),
        _column("loss", pa.float64(), "nats/token, held out"),
        _column("loss_stderr", pa.float64(), "nats/token"),
        _column("bits_per_byte", pa.float64(), "bits/byte, held out"),
        _column("width", pa.int64(), "units"),
        _column("depth", pa.int64(), "layers"),
        _column("heads", pa.int64(), "heads"),
        _column("vocabulary", pa.int64(), "symbols"),
        _column("context", pa.int64(), "tokens"),
        _column("batch_tokens", pa.int64(), "tokens/step"),
        _column("learning_rate", pa.float64(), "peak rate of the block matrices"),
        _column("schedule", pa.string(), "name"),
        _column("recipe", pa.string(), "name"),
        _column("recipe_hash", pa.string(), "hash of the recipe's rules"),
        _column("trainer", pa.string(), "name and version"),
        _column("corpus", pa.string(), "name"),
        _column("corpus_hash", pa.string(), "hash of the training and held-out tokens"),
        _column("seed", pa.int64(), "seed"),
        _column("seconds", pa.float64(), "seconds of wall time"),
        _column("device", pa.string(), "name"),
        _column("mfu", pa.float64(), "fraction of the device's peak FLOP/s, null if not measured"),
        _column("curve", _CURVE, "loss curve: tokens, FLOPs, nats/token"),
        _column("versions", pa.string(), "JSON: versions of Python and libraries"),
        _column("finished_at", pa.timestamp("us", tz="UTC"), "UTC"),
        _column("schema_version", pa.int64(), "version of this schema"),
    ]
)

KIND_COLUMNS = ("trainer", "recipe_hash", "schedule", "context", "vocabulary", "corpus_hash")
"""What observations of one fit must share: otherwise their losses are not comparable."""

_NAMES = {"recipe_hash": "recipe", "corpus_hash": "corpus"}
"""Columns with people's names for what a hash tells apart."""


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Measured (N, D, C, L) of one kind, under one convention. Arrays have shape (n,)."""

    params: FloatArray
    """N, in parameters, counted as `params_convention` says."""
    tokens: FloatArray
    """D, in tokens."""
    flops: FloatArray
    """C, in FLOPs, counted as `flops_convention` says."""
    loss: FloatArray
    """L, held-out loss in nats/token."""
    loss_stderr: FloatArray
    """Standard error of `loss` in nats/token; NaN where unknown."""
    budget: FloatArray
    """Nominal FLOP budget that the observation was planned at; NaN where there is none."""
    params_convention: ParamsConvention = "non_embedding"
    flops_convention: FlopsConvention = "exact"

    def __len__(self) -> int:
        return len(self.loss)

    def budgets(self) -> FloatArray:
        """Distinct nominal budgets in FLOPs, ascending, shape (k,)."""
        return np.unique(self.budget[np.isfinite(self.budget)])

    def select(self, mask: NDArray[np.bool_]) -> Observations:
        """Those rows where `mask`, shape (n,), is true."""
        columns = ("params", "tokens", "flops", "loss", "loss_stderr", "budget")
        return replace(self, **{name: getattr(self, name)[mask] for name in columns})


def read_parquet(paths: Sequence[Path]) -> pa.Table:
    """Read observation files into one table with `SCHEMA`'s columns.

    Raises
    ------
    InputError
        If a file is cut short, is no Parquet file, or lacks one of the columns.
    """
    return pa.concat_tables([_read_one(path) for path in paths] or [SCHEMA.empty_table()])


def _read_one(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}): "
            "it was cut short or damaged; move it away and run the sweep again to measure it anew"
        ) from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path} is not an isoflop observation: it lacks the columns {', '.join(missing)}"
        )
    try:
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path} has columns of foreign types: {error}") from error


def where(table: pa.Table, conditions: Mapping[str, str]) -> pa.Table:
    """Rows whose columns equal the given values, compared as text.

    Raises
    ------
    InputError
        If a column does not exist or nothing is left.
    """
    for name, value in conditions.items():
        if name not in table.column_names or name == "curve":
            choices = ", ".join((*_NAMES.values(), *KIND_COLUMNS))
            raise InputError(f"no column {name!r} to select on; choose among {choices}")
        kept = table.filter(pc.equal(pc.cast(table[name], pa.string()), value))
        if kept.num_rows == 0 and table.num_rows > 0:
            have = sorted({str(v) for v in table[name].to_pylist()})
            raise InputError(f"no observation has {name}={value}; there are {', '.join(have)}")
        table = kept
    return table


def kinds(table: pa.Table) -> list[dict[str, Any]]:
    """The distinct kinds in `table`, each with names and its `count`, most frequent first.

    Equal content under several names is one kind, by the first of them.
    """
    names = [(name, "min") for name in _NAMES.values()]
    grouped = table.group_by(list(KIND_COLUMNS)).aggregate([("trial", "count"), *names])
    rows = [
        {
            **{name: row[name] for name in KIND_COLUMNS},
            **{name: row[f"{name}_min"] for name in _NAMES.values()},
            "count": row["trial_count"],
        }
        for row in grouped.to_pylist()
    ]
    return sorted(rows, key=lambda row: -int(row["count"]))


def require_one_kind(table: pa.Table) -> None:
    """Refuse a table that mixes kinds.

    Raises
    ------
    InputError
        Listing the kinds, what they differ in, and how to select one.
    """
    found = kinds(table)
    if len(found) <= 1:
        return

    def distinct(name: str) -> int:
        return len({str(kind[name]) for kind in found})

    differing = [
        _NAMES[name] if name in _NAMES and distinct(_NAMES[name]) == distinct(name) else name
        for name in KIND_COLUMNS
        if distinct(name) > 1
    ]
    listed = "; ".join(
        f"{kind['count']} with " + ", ".join(f"{name}={kind[name]}" for name in differing)
        for kind in found
    )
    raise InputError(
        f"observations of {len(found)} kinds cannot share a fit ({listed}): "
        f"select one with --where {differing[0]}={found[0][differing[0]]}"
    )


def observations(
    table: pa.Table,
    budgets: Mapping[ObservationId, float],
    *,
    params: ParamsConvention = "non_embedding",
    flops: FlopsConvention = "exact",
) -> Observations:
    """View the complete rows of `table` as (N, D, C, L) under one convention.

    Parameters
    ----------
    table
        Rows with `SCHEMA`'s columns. Rows that are not `complete` are left out.
    budgets
        Nominal budget in FLOPs by (trial, tokens); absent observations get NaN.
    params, flops
        How N and C are counted. `6nd` multiplies by the N of `params`.

    Raises
    ------
    InputError
        If no complete row is left.
    """
    if params not in get_args(ParamsConvention) or flops not in get_args(FlopsConvention):
        raise ValueError(f"unknown convention {params!r}, {flops!r}")
    complete = table.filter(pc.equal(table["status"], "complete"))
    if complete.num_rows == 0:
        if table.num_rows:
            raise InputError(f"all {table.num_rows} observations diverged: nothing to fit")
        raise InputError("the ledger is empty: run the sweep first")

    def column(name: str) -> FloatArray:
        return np.asarray(complete[name].to_numpy(), dtype=np.float64)

    n, d = column(f"params_{params}"), column("tokens")
    names = zip(complete["trial"].to_pylist(), complete["tokens"].to_pylist(), strict=True)
    return Observations(
        params=n,
        tokens=d,
        flops=column("flops_exact") if flops == "exact" else 6 * n * d,
        loss=column("loss"),
        loss_stderr=column("loss_stderr"),
        budget=np.array([budgets.get(name, np.nan) for name in names], dtype=np.float64),
        params_convention=params,
        flops_convention=flops,
    )
