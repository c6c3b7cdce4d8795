"""Files of text as blocks of whole lines in UTF-8: unpacked, decoded, without comments.

What the lines mean is for `files.py`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from analysis.bounds import (
    MOST_LINE_BYTES,
    MOST_ROWS,
    MOST_TABLE_BYTES,
    require_unpacked,
    size_of,
)
from analysis.errors import InputError

BLOCK_BYTES = 1 << 20
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_GZIP = b"\x1f\x8b"
COMMENT = re.compile(rb"(?m)^#(?!N/A)[^\n]*\n?")
"""A line that begins with #, but for the #N/A of a spreadsheet."""


def blocks(path: Path, *, comments: bool = False, lines: bool = True) -> Iterator[bytes]:
    """Blocks of a file's text in UTF-8, without a byte order mark, each of whole lines.

    Parameters
    ----------
    path
        Compressed by gzip or not, whatever its name says; in UTF-8, or in UTF-16 or UTF-32 with a
        byte order mark.
    comments
        Leave out lines that begin with #.
    lines
        Whether blocks are of whole lines; else they end anywhere.

    Raises
    ------
    InputError
        If it unpacks to more than a file of its size may, is larger than a table may be, or has
        more or longer lines.
    InputError
        If it is in another encoding, with the first byte that says so, its line, and the command
        that converts it.
    """
    with _opened(path) as file:
        encoding = _encoding(file.peek(4))
        decoder = codecs.getincrementaldecoder(encoding)()
        rest = b""
        size = path.stat().st_size
        total = rows = 0
        while True:
            read = file.read(BLOCK_BYTES)
            total += len(read)
            rows += read.count(b"\n")
            _require_bounds(path, size, total, rows, len(rest))
            if not (encoding == "utf-8" and read.isascii() and not decoder.getstate()[0]):
                try:
                    text = decoder.decode(read, final=not read)
                except UnicodeDecodeError as error:
                    raise InputError(_not_utf8(path)) from error
                block = text.encode()
            else:
                block = read
            if b"\0" in block:
                raise InputError(_not_text(path))
            block = rest + block
            end = block.rfind(b"\n") + 1 if read and lines else len(block)
            block, rest = block[:end], block[end:]
            if comments and (block.startswith(b"#") or b"\n#" in block):
                block = COMMENT.sub(b"", block)
            if block:
                yield block
            if not read:
                return


class BlockFile(io.RawIOBase):
    """Blocks as a file that others read; a read gives at most one block."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        super().__init__()
        self._parts = parts
        self._rest = b""

    def readable(self) -> bool:
        """Say that it can be read, as every file of blocks can."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, none at the end."""
        if size is None or size < 0:
            whole = self._rest + b"".join(self._parts)
            self._rest = b""
            return whole
        block = self._rest or next(self._parts, b"")
        self._rest = block[size:]
        return block[:size]


def decoded(data: bytes, name: str) -> str:
    """The text of a small file, without a byte order mark.

    Parameters
    ----------
    data
        Its content, in an encoding as `blocks` reads it.
    name
        What it is called in errors.

    Raises
    ------
    InputError
        If it is in another encoding, with the first byte that says so and its line.
    """
    try:
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} is not in UTF-8: line {line} has the byte 0x{data[error.start]:02x}. Save it "
            f"as UTF-8, or convert it with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error


def _opened(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return io.BufferedReader(gzip.open(path)) if packed else path.open("rb")


def _require_bounds(path: Path, size: int, total: int, rows: int, line: int) -> None:
    """Refuse what has been read of a table if it is more than a table can be."""
    require_unpacked(str(path), size, total)
    if total > MOST_TABLE_BYTES:
        raise InputError(
            f"{path} has more than {size_of(MOST_TABLE_BYTES)} of text, the most that a table may "
            "have: keep the rows and columns that are to be fitted"
        )
    if rows > MOST_ROWS:
        raise InputError(
            f"{path} has more than {MOST_ROWS:,} lines, the most that a table may have: keep those "
            "that are to be fitted"
        )
    if line > MOST_LINE_BYTES:
        raise InputError(
            f"{path} has a line of more than {size_of(MOST_LINE_BYTES)} that begins after line "
            f"{rows:,}, the most that a row may take: is it a table?"
        )


def _encoding(start: bytes) -> str:
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def _not_utf8(path: Path) -> str:
    """Say which byte of a file is not UTF-8, and what to do."""
    where = "it ends within a character"
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"line {number} has the byte 0x{line[error.start]:02x}"
                break
    return (
        f"{path} is not in UTF-8: {where}. If it was written in Latin-1 or on Windows, convert it "
        f"with `{_iconv(path, 'WINDOWS-1252')}`"
    )


def _not_text(path: Path) -> str:
    return (
        f"{path} holds zero bytes, as no text in UTF-8 does. If it is UTF-16, convert it with "
        f"`{_iconv(path, 'UTF-16LE')}`"
    )


def _iconv(path: Path, encoding: str) -> str:
    name = path.name.removesuffix(".gz")
    stem, dot, suffix = name.rpartition(".")
    target = shlex.quote(str(path.with_name(f"{stem or suffix}-utf8{dot}{suffix}")))
    source = shlex.quote(str(path))
    if path.name != name:
        return f"gunzip -c {source} | iconv -f {encoding} -t UTF-8 > {target}"
    return f"iconv -f {encoding} -t UTF-8 {source} > {target}"
