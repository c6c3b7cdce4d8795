"""Documents of files: text, JSON lines and Parquet, in pieces that processes can read side by side.

What a document is depends on the files alone, not on how many processes read them.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from analysis.bounds import EXPANSION, LEAST_UNPACKED, require_unpacked, size_of
from analysis.errors import InputError
from analysis.writing import replacing

if TYPE_CHECKING:
    from analysis.packed import Packed

UNIT_BYTES = 8 << 20
"""What a process reads at a time, about: much more than a task costs, much less than memory."""
PIECE_BYTES = 1 << 15
"""A text file that is longer is cut at line ends about so far apart, so that a part of it can be
held out and it need not fit into memory."""
CHARACTER_BYTES = 4
"""Of UTF-8, at most."""
PARQUET_ROWS = 256
"""Rows in memory at a time."""
MOST_DOCUMENT_BYTES = 128 << 20
"""Bytes of the text of a row: ten times the longest books. It is in memory several times over."""
MOST_ROW_BYTES = 256 << 20
"""Bytes of a line of JSON, in which there are escapes and other columns."""
MOST_EMPTY_ROWS = 10_000_000
"""Rows of a Parquet file that may stand in fewer bytes than one each."""
FRESH_NS = 2 * 10**9
"""A file that was written so lately may be written again with its time unchanged."""

Kind = Literal["text", "jsonl", "jsonl.gz", "parquet"]
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")


class Document(NamedTuple):
    """A document, or a piece of a long text file."""

    text: bytes
    ends: bool
    """False for a piece that another follows."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes from `start` to `stop`, row groups for Parquet."""

    path: str
    kind: Kind
    start: int
    stop: int
    size: int
    """Of its bytes on disk, about."""


class UnfitError(InputError):
    """A file that is not what its suffix says, or whose text cannot be used."""


def files(pattern: str) -> list[Path]:
    """Files that a glob matches, in sorted order.

    Raises
    ------
    InputError
        If there is none, or one is compressed in a way that is not read.
    """
    found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
    if not found:
        raise InputError(f"no file matches the corpus glob {pattern!r}")
    for path in found:
        if kind_of(path) == "text" and path.suffix.lower() in _COMPRESSED:
            raise InputError(
                f"{path} is compressed, which is read of .jsonl.gz alone: unpack it, or let the "
                "corpus glob match other files"
            )
    return found


def kind_of(path: Path) -> Kind:
    """What a file holds, by its suffix."""
    name = path.name.lower()
    if name.endswith(".jsonl.gz"):
        return "jsonl.gz"
    if name.endswith(".jsonl"):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def units(paths: Iterable[Path], column: str) -> Iterator[tuple[Span, ...]]:
    """The files in order, in groups of about `UNIT_BYTES`."""
    group: list[Span] = []
    size = 0
    for path in paths:
        for span in _spans(path, column):
            group.append(span)
            size += span.size
            if size >= UNIT_BYTES:
                yield tuple(group)
                group, size = [], 0
    if group:
        yield tuple(group)


def read(span: Span, column: str) -> Iterator[Document]:
    """Its documents, in order.

    Raises
    ------
    InputError
        If a row cannot be read or has no such column; it names the file and the line.
    """
    match span.kind:
        case "text":
            return _read_text(span)
        case "jsonl":
            return _read_jsonl(span, column)
        case "jsonl.gz":
            return _read_gzip(span, column)
        case "parquet":
            return _read_parquet(span, column)


def _spans(path: Path, column: str) -> Iterator[Span]:
    kind, size = kind_of(path), path.stat().st_size
    if kind == "parquet":
        with _parquet(path, column).file as file:
            _require_announced(path, file.metadata, column)
            groups = file.metadata.num_row_groups
        for group in range(groups):
            yield Span(str(path), kind, group, group + 1, size // groups)
    elif kind == "jsonl.gz":
        yield Span(str(path), kind, 0, size, size)
    else:
        for start in range(0, size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, size)
            yield Span(str(path), kind, start, stop, stop - start)


def _read_text(span: Span) -> Iterator[Document]:
    with open(span.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        base = max(span.start - 1, 0)
        file.seek(base)
        data = file.read(span.stop + PIECE_BYTES - base)
    edges = [*range(span.start, span.stop, PIECE_BYTES), span.stop]
    cuts = [_cut(data, base, edge, size) for edge in edges]
    for start, stop in pairwise(cuts):
        if stop > start:
            yield Document(data[start - base : stop - base], stop == size)


def _cut(data: bytes, base: int, edge: int, size: int) -> int:
    """Where the piece from about `edge` on begins: a line, or a character where lines are long."""
    if edge in (0, size):
        return edge
    line = data.find(b"\n", edge - 1 - base, edge - base + PIECE_BYTES)
    if line >= 0:
        return base + line + 1
    for start in range(edge, edge + CHARACTER_BYTES):
        if start == size or data[start - base] & 0xC0 != 0x80:  # not within a character of UTF-8
            return start
    return edge  # nor is this, then: it is no UTF-8


def _read_jsonl(span: Span, column: str) -> Iterator[Document]:
    with open(span.path, "rb") as file:
        place = span.start
        if place > 0:  # the line that begins before is the previous span's
            file.seek(place - 1)
            place += len(file.readline(MOST_ROW_BYTES)) - 1
        while place < span.stop and (line := file.readline(MOST_ROW_BYTES)):
            _require_line(line, span.path, place)
            document = _row(line, span.path, column, place)
            place += len(line)
            if document is not None:
                yield document


def _read_gzip(span: Span, column: str) -> Iterator[Document]:
    place = 0
    try:
        with gzip.open(span.path, "rb") as file:
            while line := file.readline(MOST_ROW_BYTES):
                _require_line(line, span.path, place)
                document = _row(line, span.path, column, place)
                place += len(line)
                require_unpacked(span.path, span.size, place)
                if document is not None:
                    yield document
    except (OSError, EOFError, zlib.error) as error:
        raise UnfitError(f"cannot unpack {span.path}: {error}; is it whole?") from error


def _require_line(line: bytes, path: str, place: int) -> None:
    """Refuse a line that was not read to its end, since it is longer than any document."""
    if len(line) == MOST_ROW_BYTES and not line.endswith(b"\n"):
        raise UnfitError(_too_long(f"{path} line {_number(path, place)}", MOST_ROW_BYTES))


def _too_long(where: str, most: int) -> str:
    return (
        f"{where} has more than {size_of(most)}, the most that a document of a row may have: "
        "divide it into several rows, or give its text as a .txt file, which is read in pieces"
    )


def _row(line: bytes, path: str, column: str, place: int) -> Document | None:
    """The text of a line; None for an empty one."""
    if not line.strip():
        return None

    def where() -> str:
        return f"{path} line {_number(path, place)}"

    try:
        row = json.loads(line)
    except ValueError as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UnfitError(f"{where()} is no JSON: {said}") from error
    except RecursionError:  # its trace would be a thousand lines
        raise UnfitError(f"{where()} is nested too deeply to be read: mend that row") from None
    if not isinstance(row, dict):
        raise UnfitError(f"{where()} is a {type(row).__name__}, but it should be an object")
    if column not in row:
        raise UnfitError(no_column(where(), column, row))
    return document(row[column], column, where)


def no_column(where: str, column: str, others: Iterable[str]) -> str:
    """The sentence for rows without the column that was asked for."""
    names = ", ".join(map(repr, others)) or "none at all"
    return f"{where} has no column {column!r}, but {names}: set column to that of the text"


def document(text: Any, column: str, where: Callable[[], str]) -> Document:
    """A row's text, checked; none is empty. `where` says which row, if it must be said."""
    if text is not None and not isinstance(text, str):
        raise UnfitError(
            f"{where()} has a {type(text).__name__} in column {column!r}, and text is needed: set "
            "column to that of the text"
        )
    try:
        data = (text or "").encode()
    except UnicodeEncodeError as error:
        raise UnfitError(
            f"{where()} has half of a surrogate pair, which is no character: mend that row"
        ) from error
    if len(data) > MOST_DOCUMENT_BYTES:
        raise UnfitError(_too_long(where(), MOST_DOCUMENT_BYTES))
    return Document(data, True)


def _number(path: str, place: int) -> int:
    """The line, from 1 on, that begins after `place` bytes of the unpacked file."""
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        lines = 1
        while place > 0 and (block := file.read(min(place, 1 << 20))):
            lines += block.count(b"\n")
            place -= len(block)
        return lines


def _parquet(path: Path, column: str) -> Packed:
    import pyarrow as pa

    from analysis.packed import open_packed

    try:
        opened = open_packed(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnfitError(f"cannot read {path} as Parquet: {error}") from error
    names = opened.file.schema_arrow.names
    if column not in names:
        raise UnfitError(no_column(str(path), column, names))
    return opened


def _require_announced(path: Path, about: Any, column: str) -> None:
    """Refuse a Parquet file whose footer announces more than such a file can hold of text."""
    size = path.stat().st_size
    if about.num_rows > max(MOST_EMPTY_ROWS, size):
        raise UnfitError(
            f"{path} of {size_of(size)} has {about.num_rows:,} rows, more than "
            f"{MOST_EMPTY_ROWS:,} and more than bytes: its rows are empty or all alike; is it text?"
        )
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if sum(chunk.total_compressed_size for chunk in chunks) > size:
        raise UnfitError(f"cannot read {path} as Parquet: it has fewer bytes than its columns say")
    for chunk in chunks:
        if chunk.path_in_schema == column:
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            require_unpacked(f"a column of {path}", packed, unpacked)


def _most_text(about: Any, groups: Sequence[int], column: str) -> int:
    """Return the bytes that texts of row groups may come to, by what they take in the file."""
    leaves = [i for i in range(about.num_columns) if about.schema.column(i).path == column]
    size = sum(about.row_group(g).column(i).total_compressed_size for g in groups for i in leaves)
    return max(LEAST_UNPACKED * len(groups) // int(about.num_row_groups), EXPANSION * int(size))


def _read_parquet(span: Span, column: str) -> Iterator[Document]:
    import pyarrow as pa

    path = Path(span.path)
    opened = _parquet(path, column)
    with opened.file as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
        groups = list(range(span.start, span.stop))
        most, total = _most_text(file.metadata, groups, column), 0
        try:
            # Text that is repeated takes few bytes of a file: a row at a time, if it is long.
            rows = opened.rows_at_once(groups, [column], most=PARQUET_ROWS)
            for batch in file.iter_batches(rows, row_groups=groups, columns=[column]):
                for text in batch.column(0):
                    row += 1
                    made = document(text.as_py(), column, lambda: f"{path} row {row}")  # noqa: B023
                    total += len(made.text)
                    if total > most:
                        raise UnfitError(
                            f"{path} up to row {row} has more than {size_of(most)} of "
                            f"text, {EXPANSION} times what they take in the file: is it text? If "
                            "its rows are repeated by intention, write them as .jsonl"
                        )
                    yield made
        except (pa.ArrowInvalid, OSError) as error:
            raise UnfitError(f"cannot read {span.path} as Parquet: {error}") from error


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, by which a file is taken to be the same."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hashes(paths: Sequence[Path], cache: Path) -> list[str]:
    """SHA-256 of each file, remembered in `cache` by all their paths and stamps.

    Raises
    ------
    InputError
        If a file changes while it is read.
    """
    stamps = [stamp(path) for path in paths]
    seen = [[str(path.absolute()), *s] for path, s in zip(paths, stamps, strict=True)]
    known = cache / f"{hashlib.sha256(json.dumps(seen).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):
        hashes: list[str] = json.loads(known.read_text())
        if len(hashes) == len(paths):
            return hashes
    hashes = []
    for path, before in zip(paths, stamps, strict=True):
        hashes.append(file_hash(path))
        if stamp(path) != before:
            raise InputError(f"{path} changed while it was read: wait until nobody writes it")
    if time.time_ns() - max((changed for _, changed in stamps), default=0) > FRESH_NS:
        with suppress(OSError):  # it is computed again, then
            cache.mkdir(parents=True, exist_ok=True)
            with replacing(known) as file:
                file.write(json.dumps(hashes).encode())
    return hashes
