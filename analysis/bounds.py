"""Bounds on what a file may unpack to. A few bytes of Parquet or gzip can stand for gigabytes.

All are far above what tables of runs and corpora of text come to; who meets one is told what to do.
"""

from __future__ import annotations

from analysis.errors import InputError

MOST_ROWS = 20_000_000
"""Rows of a table."""
MOST_COLUMNS = 10_000
"""Columns of a table."""
MOST_TABLE_BYTES = 2 << 30
"""Bytes of a table in memory: a hundred columns of two million numbers are 1.6 GB."""
MOST_LINE_BYTES = 64 << 20
"""Bytes of a line of a table."""
MOST_JSON_BYTES = 256 << 20
"""Bytes of a JSON file that is one list, which is parsed as a whole, at some ten times its size."""
LEAST_UNPACKED = 256 << 20
"""Bytes that any compressed file may unpack to, however small it is."""
EXPANSION = 100
"""Times its own size that a larger file may unpack to. Text packs 3 to 20 times, gzip at most 1032
(RFC 1951: 258 bytes in 2 bits); Parquet's dictionaries and runs know no limit."""


def most_unpacked(size: int) -> int:
    """Return the bytes that a compressed file of a size may unpack to."""
    return max(LEAST_UNPACKED, EXPANSION * size)


def size_of(count: float) -> str:
    """Return a number of bytes for people, such as 256 MiB.

    Examples
    --------
    >>> [size_of(n) for n in (704, 256 << 20, 5 << 30)]
    ['704 bytes', '256 MiB', '5 GiB']
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"


def require_unpacked(name: str, size: int, unpacked: int) -> None:
    """Refuse a compressed file that has unpacked to more than one of its `size` may.

    Raises
    ------
    InputError
        With its size and the bound.
    """
    if unpacked > most_unpacked(size):
        raise InputError(
            f"{name} of {size_of(size)} unpacks to more than {size_of(most_unpacked(size))}, which "
            "no text does: unpack it yourself, if it is what you think it is, and look at it"
        )
