"""Small files that unpack to gigabytes, for tests of what is refused."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_file(path: Path, columns: Mapping[str, pa.Array], **options: object) -> Path:
    """Write columns to a Parquet file in which a text that is repeated stands once."""
    settings = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(pa.table(columns), path, **{**settings, **options})
    return path


def repeated(value: object, rows: int) -> pa.Array:
    """Return a column that has one value in all rows, and holds it once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def gzip_file(path: Path, pieces: Iterable[bytes]) -> Path:
    """Write pieces to a gzip file, as small as it gets."""
    pack = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        for piece in pieces:
            file.write(pack.compress(piece))
        file.write(pack.flush())
    return path
