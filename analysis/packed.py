"""Parquet files looked at before they are read: what they announce, and what they may unpack to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.bounds import MOST_ROWS, MOST_TABLE_BYTES, size_of
from analysis.errors import InputError

_BATCH_BYTES = 64 << 20
_HEADER_BYTES = 64
"""More than the part of a page's header that is looked at."""


@dataclass(frozen=True)
class Packed:
    """An open Parquet file, and what is needed to look at it before it is read."""

    name: str
    """Name of the file in errors."""
    file: pq.ParquetFile
    head: Callable[[int], bytes]
    """Gives the first bytes from a place on."""

    def read(self, columns: list[str] | None = None, *, use_threads: bool = True) -> pa.Table:
        """Read columns, unless they come to more than `MOST_TABLE_BYTES`.

        What a footer announces is refused before anything is read. How often a text is repeated
        is told by nothing but reading it, which is first done a bounded number of rows at a time.

        Raises
        ------
        InputError
            If there is more, or more rows than a table may have.
        """
        values, size = self._announced()
        if values * size <= MOST_TABLE_BYTES:  # as every row of a ledger
            return self.file.read(columns, use_threads=use_threads)
        groups, leaves = range(self.file.metadata.num_row_groups), self._leaves(columns)
        if sum(self._most_bytes(group, leaves) for group in groups) > MOST_TABLE_BYTES:
            rows, total = self.rows_at_once(groups, columns, most=MOST_ROWS), 0
            for batch in self.file.iter_batches(rows, columns=columns, use_threads=use_threads):
                total += batch.nbytes
                _require_table(self.name, total)
        return self.file.read(columns, use_threads=use_threads)

    def _announced(self) -> tuple[int, int]:
        """Number of values, and bytes in the file's encodings, unless they are too many."""
        about = self.file.metadata
        if about.num_rows > MOST_ROWS:
            raise InputError(
                f"{self.name} has {about.num_rows:,} rows, more than the {MOST_ROWS:,} that a "
                "table may have: keep the rows that are to be fitted"
            )
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        values = sum(g.column(i).num_values for g in groups for i in range(g.num_columns))
        _require_table(self.name, 8 * values)
        size = sum(group.total_byte_size for group in groups)
        _require_table(self.name, size)
        return int(values), int(size)

    def rows_at_once(
        self, groups: Iterable[int], columns: Sequence[str] | None, *, most: int
    ) -> int:
        """Return how many rows of those columns take about 64 MiB, at least 1, at most `most`."""
        leaves = self._leaves(columns)
        for group in groups:
            rows = self.file.metadata.row_group(group).num_rows
            width = self._most_bytes(group, leaves) / max(rows, 1)
            most = min(most, int(_BATCH_BYTES / max(width, 1.0)))
        return max(1, most)

    def _most_bytes(self, group: int, leaves: list[int]) -> float:
        """Bytes that leaf columns of a row group may take, if their largest value is in each."""
        part = self.file.metadata.row_group(group)
        rows = int(part.num_rows)
        return sum(self._width(part.column(i), rows) * rows for i in leaves)

    def _leaves(self, columns: Sequence[str] | None) -> list[int]:
        """Numbers of the leaf columns in columns of those names; of all without names."""
        paths = [self.file.schema.column(i).path for i in range(self.file.metadata.num_columns)]
        if columns is None:
            return list(range(len(paths)))
        below, names = tuple(f"{name}." for name in columns), set(columns)
        return [i for i, p in enumerate(paths) if p in names or p.startswith(below)]

    def _width(self, chunk: Any, rows: int) -> float:
        """Bytes of a row of a leaf column: the largest it can have where values repeat."""
        size, count = float(chunk.total_uncompressed_size), int(chunk.num_values)
        value = max(8.0, size / max(1, count))
        if chunk.physical_type == "BYTE_ARRAY":
            if "DELTA_BYTE_ARRAY" in chunk.encodings:  # values share what is before them
                value = max(value, size)
            elif chunk.has_dictionary_page:
                value = max(value, float(self._dictionary_bytes(chunk)))
        return value * count / max(1, rows)

    def _dictionary_bytes(self, chunk: Any) -> int:
        """Return the size of a column's dictionary unpacked, which no value in it exceeds.

        It is in the header of its page, a struct of Thrift's compact protocol: type, unpacked size
        and packed size, each a byte that names the field (0x15: the next one, an integer) and a
        zigzag varint (parquet.thrift, PageHeader).
        """
        numbers = _integers(self.head(chunk.dictionary_page_offset))
        next(numbers, None)
        return next(numbers, 0) or int(chunk.total_uncompressed_size)


def open_packed(path: Path) -> Packed:
    """Open a Parquet file; what pyarrow raises where it is none goes through."""

    def head(place: int) -> bytes:
        with path.open("rb") as file:
            file.seek(place)
            return file.read(_HEADER_BYTES)

    return Packed(str(path), pq.ParquetFile(path, buffer_size=1 << 20), head)


def packed(name: str, data: bytes) -> Packed:
    """Open Parquet bytes; what pyarrow raises where they are none goes through."""
    file = pq.ParquetFile(pa.BufferReader(data))
    return Packed(name, file, lambda place: data[place : place + _HEADER_BYTES])


def _integers(header: bytes) -> Iterator[int]:
    place = 0
    while place < len(header) and header[place] == 0x15:
        place += 1
        number = shift = 0
        while place < len(header):
            number |= (header[place] & 0x7F) << shift
            shift += 7
            place += 1
            if not header[place - 1] & 0x80:
                break
        yield (number >> 1) ^ -(number & 1)


def _require_table(name: str, size: int) -> None:
    if size > MOST_TABLE_BYTES:
        raise InputError(
            f"{name} unpacks to more than {size_of(MOST_TABLE_BYTES)}, the most that a table may "
            "take in memory: keep the rows and columns that are to be fitted"
        )
