"""The losses that observations may be fitted by: held-out, in bits per byte, or one domain's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.errors import InputError

LOSSES = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
"""Columns of a ledger that can be fitted, with their units."""


def losses_of(table: pa.Table, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """A loss of each of n rows, its standard error, and its unit; NaN where a row has none.

    Parameters
    ----------
    table
        With the columns `loss`, `loss_stderr`, `loss_unit`, `bits_per_byte` and `domains`.
    name
        One of `LOSSES`, or a further held-out set, whose loss is in nats/token.

    Raises
    ------
    InputError
        If there is no such loss, or rows of several units.
    """
    if name in LOSSES:
        values = floats(table[name])
        if name != "loss":
            return values, np.full(len(values), np.nan), LOSSES[name]
        return values, floats(table["loss_stderr"]), _unit(table["loss_unit"])
    rows = [
        {domain["name"]: domain for domain in row or ()} for row in table["domains"].to_pylist()
    ]
    names = sorted({domain for row in rows for domain in row})
    if name not in names:
        raise InputError(
            f"--loss {name}: no such loss; choose among {', '.join([*LOSSES, *names])}"
        )
    found = [row.get(name, {}) for row in rows]
    values, stderr = (
        np.array([row.get(part) for row in found], dtype=np.float64)
        for part in ("loss", "loss_stderr")
    )
    return values, stderr, "nats/token"


def _unit(column: pa.ChunkedArray) -> str:
    """The unit that all rows share; external rows say theirs."""
    units = pc.unique(pc.fill_null(column, LOSSES["loss"])).to_pylist()
    if len(units) > 1:
        raise InputError(
            f"losses of {len(units)} units cannot share a fit ({', '.join(sorted(units))}): select "
            "one with --where loss_unit=..."
        )
    return str(units[0]) if units else LOSSES["loss"]


def floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of numbers, shape (n,); NaN where null."""
    return np.asarray(column.to_numpy(), dtype=np.float64)
