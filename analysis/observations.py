"""The observation table: schema with units, reading, choosing one kind, and the (N, D, C, L) view.

Where observations come from is of no interest here; `orchestrator/ledger.py` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.arrow_types import require_distinct_names
from analysis.errors import InputError
from analysis.losses import floats, losses_of
from analysis.numerals import read_number
from analysis.wording import plural, where_option, written

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
ParamsConvention = Literal["non_embedding", "matmul", "total", "given", "derived"]
FlopsConvention = Literal["exact", "given", "6nd"]
"""`given` is whatever the source of foreign data counted; a `derived` N is C/(6D)."""
ObservationId = tuple[str, int]
"""(trial key, tokens): the name of one observation."""

SCHEMA_VERSION = 5

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


_DOMAINS = pa.list_(
    pa.struct(
        [
            pa.field("name", pa.string()),
            pa.field("loss", pa.float64()),
            pa.field("loss_stderr", pa.float64()),
            pa.field("bits_per_byte", pa.float64()),
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
        _column("budget", pa.float64(), "FLOPs, nominal, where no plan tells it"),
        _column("params_given", pa.float64(), "parameters, as the source counts them"),
        _column("flops_given", pa.float64(), "FLOPs, as the source counts them"),
        _column("weight", pa.float64(), "of the squared residual, 1 where null"),
        _column("trunk", pa.string(), "rows that share noise, else null"),
        _column("domains", _DOMAINS, "further held-out sets: nats/token, bits/byte"),
        _column("precision", pa.string(), "of products and activations, fp32 where null"),
        _column("probe_rate", pa.float64(), "of a probe: its peak rates over its recipe's"),
        _column("probe_batch", pa.float64(), "of a probe: its batch over its recipe's"),
        _column("loss_unit", pa.string(), "of the loss of external rows, nats/token where null"),
        _column("resumed_from", pa.int64(), "step of the checkpoint that its attempt started from"),
        _column("loss_step", pa.int64(), "step after which the held-out loss was measured"),
        _column("compile_seconds", pa.float64(), "seconds to compile, which `seconds` leaves out"),
    ]
)

LATER = (
    *("budget", "params_given", "flops_given", "weight", "trunk", "domains", "precision"),
    *("probe_rate", "probe_batch", "loss_unit", "resumed_from", "loss_step"),
    "compile_seconds",
)
"""Columns that earlier versions had not: null where a file lacks them."""

KIND_COLUMNS = ("trainer", "recipe_hash", "schedule", "context", "vocabulary", "corpus_hash")
"""What observations of one fit must share: otherwise their losses are not comparable."""

_SMALLEST, _LARGEST = 1e-30, 1e40
"""Between which every N, D and C lies: what is beyond was not measured, and its square and its
powers would be no numbers."""
_LARGEST_LOSS = 1e9
"""The same of losses; a perplexity is below it, too."""
_OUTWEIGHS = 1e12
"""A row of this many times the median weight would be the whole fit, and a parabola no parabola."""
_SHOWN = 12  # values listed in an error
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
    weight: FloatArray = field(default_factory=lambda: np.empty(0))
    """What multiplies a row's squared residual, at least 0; by default 1, as of a run to come."""
    trunk: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Label of the training run; rows of one label share noise. By default each its own."""

    loss_unit: str = "nats/token"
    """Of `loss`, where another measure than the loss is fitted."""
    rows: int = 0
    """Rows behind them, more than there are here where they were pooled; by default as many."""

    def __post_init__(self) -> None:
        if self.rows == 0:
            object.__setattr__(self, "rows", len(self))
        if len(self.weight) == 0:
            object.__setattr__(self, "weight", np.ones(len(self)))
        if len(self.trunk) == 0:
            object.__setattr__(self, "trunk", np.arange(len(self), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.loss)

    def budgets(self) -> FloatArray:
        """Distinct nominal budgets in FLOPs, ascending, shape (k,)."""
        return np.unique(self.budget[np.isfinite(self.budget)])

    def select(self, mask: NDArray[np.bool_]) -> Observations:
        """Those rows where `mask`, shape (n,), is true."""
        columns = ("params", "tokens", "flops", "loss", "loss_stderr", "budget", "weight", "trunk")
        return replace(self, **{name: getattr(self, name)[mask] for name in columns}, rows=0)

    def without_largest(self, k: int) -> Observations:
        """Those rows whose loss is strictly below the `k`-th largest; all of them where k is 0.

        Hoffmann et al.'s points, as digitised by Besiroglu et al. 2024, are fitted so: with k = 5,
        240 of the 245 are left.

        Raises
        ------
        InputError
            If k is negative or leaves nothing.
        """
        if k == 0:
            return self
        if not 0 < k <= len(self) or not np.any(
            kept := self.loss < np.partition(self.loss, -k)[-k]
        ):
            raise InputError(
                f"dropping the {plural(k, 'largest loss', 'largest losses')} of "
                f"{plural(len(self), 'observation')} leaves none: drop fewer"
            )
        return self.select(kept)


def observation_ids(table: pa.Table) -> list[ObservationId]:
    """Names of the rows of a table, in its order."""
    return list(zip(table["trial"].to_pylist(), table["tokens"].to_pylist(), strict=True))


def has_schema(names: Iterable[str]) -> bool:
    """Whether columns of these names are isoflop observations of any version, curves or not."""
    return set(SCHEMA.names) - {*LATER, "curve"} <= set(names)


def as_schema(table: pa.Table, name: str, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Cast a table to `SCHEMA`, or a part of it; columns that it lacks are null.

    Raises
    ------
    InputError
        If a column is of another type; `name` says where it is from.
    """
    for column in schema:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    try:
        return table.select(schema.names).cast(schema)
    # Text that is no number, and pairs of types that Arrow knows no way between.
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{name} has columns of foreign types: {error}") from error


def where(table: pa.Table, conditions: Mapping[str, str]) -> pa.Table:
    """Rows whose columns equal the given values, as `equals` compares them.

    Raises
    ------
    InputError
        If a column does not exist, several have its name, it holds lists, or nothing is left.
    """
    for name, value in conditions.items():
        while name not in table.column_names and "=" in value:  # of a column called a=b
            more, _, value = value.partition("=")
            name = f"{name}={more}"
        _require_selectable(table, name)
        kept = table.filter(equals(table[name], value))
        if kept.num_rows == 0 and table.num_rows > 0:
            there = _values(table[name])
            raise InputError(
                f"no observation has {name}={value}; there are {there}"
                if there
                else f"no observation has {name}={value}: that column is blank in every row"
            )
        table = kept
    return table


def _require_selectable(table: pa.Table, name: str) -> None:
    require_distinct_names(table, [name])
    if name in table.column_names and not pa.types.is_nested(table[name].type):
        return
    flat = [n for n in table.column_names if not pa.types.is_nested(table[n].type)]
    ours = (*_NAMES.values(), *KIND_COLUMNS) if has_schema(flat) else flat
    what = (
        f"column {name!r} holds lists, nothing"
        if name in table.column_names
        else f"no column {name!r}"
    )
    raise InputError(f"{what} to select on; choose among {', '.join(ours)}")


def _values(column: pa.ChunkedArray) -> str:
    """The first values of a column, as `--where` takes them; blanks are none."""
    values = [v for v in pc.unique(column).to_pylist() if v not in (None, "") and v == v]
    shown = [written(value) for value in sorted(values)[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(values) > _SHOWN else "")


def equals(column: pa.ChunkedArray, value: str) -> pa.ChunkedArray:
    """Whether each value of a column is what a person wrote, shape (n,).

    Numbers are compared as numbers, however both are written, and all else as text. Nothing written
    is a blank; a blank is equal to nothing else.

    Examples
    --------
    >>> equals(pa.chunked_array([[1e19, 3e19]]), "1e19").to_pylist()
    [True, False]
    >>> equals(pa.chunked_array([[100_000, None]]), "100k").to_pylist()
    [True, False]
    >>> equals(pa.chunked_array([[True, None, False]]), "False").to_pylist()
    [False, False, True]
    >>> equals(pa.chunked_array([["a", None]]), "").to_pylist()
    [False, True]
    """
    if not value:
        return pc.is_null(column, nan_is_null=True)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        try:
            found = pc.equal(pc.cast(column, pa.float64(), safe=False), read_number(value))
        except ValueError:
            found = pc.equal(pc.cast(column, pa.string()), value)
    else:
        text = value.lower() if pa.types.is_boolean(column.type) else value
        found = pc.equal(pc.cast(column, pa.string()), text)
    return pc.fill_null(found, False)


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
    first = differing[0]
    value = next(kind[first] for kind in found if kind[first] is not None)
    raise InputError(
        f"observations of {len(found)} kinds cannot share a fit ({listed}): "
        f"select one with {where_option(first, value)}"
    )


def observations(
    table: pa.Table,
    budgets: Mapping[ObservationId, float],
    *,
    params: ParamsConvention = "non_embedding",
    flops: FlopsConvention = "exact",
    loss: str = "loss",
) -> Observations:
    """View the complete rows of `table` as (N, D, C, L) under one convention.

    Parameters
    ----------
    table
        Rows with `SCHEMA`'s columns. Rows that are not `complete` are left out, and those that have
        no N, C or loss above 0.
    budgets
        Nominal budget in FLOPs by (trial, tokens); other rows have that of their `budget` column,
        if any, else NaN.
    params, flops
        How N and C are counted. `6nd` multiplies by the N of `params`.
    loss
        The column to fit, or the name of a further held-out set.

    Raises
    ------
    InputError
        If no such row is left, or no column of numbers is called `loss`.
    """
    if params not in get_args(ParamsConvention) or flops not in get_args(FlopsConvention):
        raise ValueError(f"unknown convention {params!r}, {flops!r}")
    complete = table.filter(pc.equal(table["status"], "complete"))
    if complete.num_rows == 0:
        if table.num_rows:
            raise InputError(
                f"all of {plural(table.num_rows, 'observation')} diverged: nothing to fit"
            )
        raise InputError("the ledger is empty: run the sweep first")

    def column(name: str) -> FloatArray:
        return floats(complete[name])

    n, d = column(f"params_{params}"), column("tokens")
    losses, stderr, unit = losses_of(complete, loss)
    found = Observations(
        params=n,
        tokens=d,
        flops=6 * n * d if flops == "6nd" else column(f"flops_{flops}"),
        loss=losses,
        loss_stderr=stderr,
        budget=_budgets(complete, budgets),
        params_convention=params,
        flops_convention=flops,
        loss_unit=unit,
        weight=np.nan_to_num(column("weight"), nan=1.0),
        trunk=_trunks(complete),
    )
    sizes = (found.params, found.tokens, found.flops)
    known = np.all([(n > _SMALLEST) & (n < _LARGEST) for n in sizes], axis=0)  # NaN is neither
    known &= (found.loss > _SMALLEST) & (found.loss < _LARGEST_LOSS)
    known &= found.weight <= _heaviest(found.weight)
    if not known.any():
        raise InputError(
            f"none of {plural(len(n), 'observation')} has {loss}, N as {params} and C as {flops}: "
            "choose another convention or column"
        )
    return found.select(known)


def _heaviest(weights: FloatArray) -> float:
    """The largest weight beside which the others are still told from nothing in a double."""
    counted = weights[(weights > 0.0) & np.isfinite(weights)]
    return _OUTWEIGHS * float(np.median(counted)) if len(counted) else _LARGEST


def _budgets(table: pa.Table, budgets: Mapping[ObservationId, float]) -> FloatArray:
    own = np.array(table["budget"].to_numpy(), dtype=np.float64)
    if budgets:  # a look-up a row: not for millions of rows, which no plan asks for
        names = zip(table["trial"].to_pylist(), table["tokens"].to_pylist(), strict=True)
        pairs = zip(names, own, strict=True)
        own = np.array([budgets.get(name, value) for name, value in pairs], dtype=np.float64)
    return own


def _trunks(table: pa.Table) -> IntArray:
    """One label a trial, or a trunk where it is named; rows without either stand alone."""
    name = pc.coalesce(table["trunk"], table["trial"]).combine_chunks().dictionary_encode()
    alone = -1 - np.arange(table.num_rows, dtype=np.int64)
    return np.where(name.is_null(), alone, name.indices.fill_null(0)).astype(np.int64)
