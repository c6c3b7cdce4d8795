"""Units of a loss, given by the user or read from a column's name or metadata.

isoflop's own losses are nats/token. Those of others are whatever they are: an answer that calls
bits per byte nats/token is off by a factor that nobody sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

from analysis.errors import InputError
from analysis.observations import FloatArray
from analysis.statuses import plain_name

LossUnit = Literal["nats", "bits", "bits_per_byte", "nats_per_byte", "perplexity", "unknown"]

SHOWN: Mapping[LossUnit, str] = {
    "nats": "nats/token",
    "bits": "bits/token",
    "bits_per_byte": "bits/byte",
    "nats_per_byte": "nats/byte",
    "perplexity": "nats/token",  # after taking the logarithm
}
_PARTS: Mapping[str, LossUnit] = {
    "bitsperbyte": "bits_per_byte",
    "bitsbyte": "bits_per_byte",
    "bpb": "bits_per_byte",
    "natsperbyte": "nats_per_byte",
    "natsbyte": "nats_per_byte",
    "bitspertoken": "bits",
    "bitstoken": "bits",
    "nats": "nats",
    "bits": "bits",
    "perplexity": "perplexity",
    "ppl": "perplexity",
}
"""Parts of names and units, as lower-case letters and digits, the longest first."""


def parse_loss_unit(text: str | None) -> LossUnit | None:
    """Read the unit that a person asked for.

    Raises
    ------
    InputError
        If it is none.
    """
    if text is None:
        return None
    for unit in SHOWN:
        if text == unit:
            return unit
    raise InputError(f"--loss-unit {text}: the units are {', '.join(SHOWN)}")


def loss_unit(name: str, column: pa.Field, asked: LossUnit | None) -> LossUnit:
    """Tell the unit of a loss that somebody else measured.

    Parameters
    ----------
    name
        The column's name.
    column
        Its field, whose metadata may have a `unit`, as isoflop's own have.
    asked
        What a person said it is, which counts for more than the name.

    Raises
    ------
    InputError
        If the name says perplexity and nobody asked for its logarithm.

    Examples
    --------
    >>> loss_unit("val_bpb", pa.field("val_bpb", pa.float64()), None)
    'bits_per_byte'
    >>> loss_unit("val_loss", pa.field("val_loss", pa.float64()), None)
    'unknown'
    """
    if asked is not None:
        return asked
    stated = (column.metadata or {}).get(b"unit", b"").decode(errors="replace")
    for text in (stated, name):
        plain = plain_name(text)
        unit = next((unit for part, unit in _PARTS.items() if part in plain), None)
        if unit == "perplexity":
            raise InputError(
                f"{name!r} is a perplexity, and laws are fitted to its logarithm: add --loss-unit "
                "perplexity to take it, or --loss-unit nats if it is a loss in nats/token already"
            )
        if unit is not None:
            return unit
    return "unknown"


def shown(unit: LossUnit, name: str) -> str:
    """The unit of a loss in words; where nobody says, the column that it is from."""
    return SHOWN.get(unit, f"as in {name!r}")


def convert(unit: LossUnit, name: str, values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Take the logarithm of a perplexity; every other loss stays what it is.

    Raises
    ------
    InputError
        If a perplexity is not above 1.
    """
    converted = dict(values)
    if unit != "perplexity":
        return converted
    loss = values["loss"]
    if (loss <= 1.0).any():
        raise InputError(
            f"{int(np.sum(loss <= 1.0))} of {len(loss)} rows have a perplexity ({name!r}) of at "
            f"most 1, down to {loss.min():g}, and a perplexity is above 1: is it a loss in nats?"
        )
    converted["loss"] = np.log(loss)
    if "loss_stderr" in values:
        converted["loss_stderr"] = values["loss_stderr"] / loss
    return converted
