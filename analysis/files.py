"""Files as tables: somebody's CSV, JSON or Parquet, and our own rows. Meaning is for others."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from csv import reader as csv_cells
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.json

from analysis.arrow_types import MISSING, plain_types, require_distinct_names
from analysis.bounds import (
    MOST_COLUMNS,
    MOST_JSON_BYTES,
    MOST_TABLE_BYTES,
    size_of,
)
from analysis.errors import InputError, first_line
from analysis.numerals import EXAMPLES, decimal_mark, read_number
from analysis.observations import LATER, SCHEMA, FloatArray, as_schema, has_schema
from analysis.packed import open_packed, packed
from analysis.text_files import COMMENT, BlockFile, blocks
from analysis.wording import plural

_TEXT = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet")
"""Suffixes of files that are read as tables."""
_JSON_BLOCK_BYTES = 1 << 22  # a line must fit
_HEAD_LINES = 100  # read to see where the columns' names are, and what parts the columns
_EASY_NAMES, _EASY_DEPTH = 1000, 100  # of JSON, for Arrow's reader
_NAME = re.compile(rb'"([^"\\]*)"[ \t]*:')
_INFINITE = re.compile(r"(?i)[+-]?inf(?:inity)?")


def is_table_file(path: Path | str) -> bool:
    """Whether a path or URI is, by its name, one of a table that `read_table` reads.

    Examples
    --------
    >>> [is_table_file(p) for p in ("runs.csv.gz", "s3://bucket/RUNS.Parquet", "projects/mini")]
    [True, True, False]
    """
    return str(path).lower().endswith(SUFFIXES)


def read_table(path: Path) -> pa.Table:
    """Read a file into a table of `arrow_types.plain_types`, spaces around column names removed.

    A CSV file is parted by commas, semicolons or tabs, whichever the line of names has most of;
    lines that begin with # are comments, but for a line of names (as numpy.savetxt writes it). JSON
    is an object a line, or a list of objects. Text is UTF-8, or says otherwise by a byte order
    mark, and may be compressed by gzip. Names may repeat: see `require_distinct_names`.

    Raises
    ------
    InputError
        If there is no such file, it is no table by its name, or not readable as such, or it has no
        rows.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not is_table_file(path):
        raise InputError(
            f"{path} is none of .csv, .tsv, .jsonl, .json and .parquet: convert it to one of them"
        )
    kind, read = {
        ".parquet": ("Parquet", _parquet),
        ".jsonl": ("JSON lines", _json_lines),
        ".ndjson": ("JSON lines", _json_lines),
        ".json": ("JSON", _json),
    }.get(Path(path.name.lower().removesuffix(".gz")).suffix, ("CSV", _csv))
    try:
        table = read(path)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a readable {kind} file ({first_line(error)})") from error
    if table.num_rows == 0:
        raise InputError(f"{path} has no rows: there is nothing to fit")
    if table.num_columns > MOST_COLUMNS:
        raise InputError(_too_wide(path))
    table = table.rename_columns([name.strip() for name in table.column_names])
    return plain_types(table, SCHEMA if has_schema(table.column_names) else None)


def _parquet(path: Path) -> pa.Table:
    opened = open_packed(path)
    with opened.file as file:
        if has_schema(file.schema_arrow.names):
            return opened.read()
        # Lists, such as loss curves, are no numbers of a run and may be most of the file.
        return opened.read([name for field in file.schema_arrow for name in _leaves(field)])


def _leaves(field: pa.Field, prefix: str = "") -> Iterator[str]:
    """The names by which Parquet knows what is no list in a column."""
    name, kind = f"{prefix}{field.name}", field.type
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            yield from _leaves(kind.field(i), f"{name}.")
    elif pa.types.is_map(kind) or not pa.types.is_nested(kind):
        yield name


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Delimiter, header and comments of a CSV file."""

    delimiter: str
    names: list[str] | None = None
    """Column names, if the header line begins with #."""
    comments: bool = False
    """Whether lines that begin with # are skipped."""
    first: int = 0
    """Lines before the one of names."""


def _csv(path: Path) -> pa.Table:
    layout = _layout(path)
    names = csv.ReadOptions(column_names=layout.names, skip_rows=layout.first)

    def read(columns: Mapping[str, pa.DataType] | None = None, *, newlines: bool = False) -> Any:
        parse = csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=newlines)
        convert = csv.ConvertOptions(null_values=MISSING, column_types=columns)
        lines = BlockFile(_lines(path, layout))
        return csv.read_csv(lines, read_options=names, parse_options=parse, convert_options=convert)

    try:
        return read()
    except pa.ArrowInvalid:
        # Types are told by the first block; where another belies it all is read as text, in which
        # `plain_types` sees numbers. A value may be of several lines, too.
        parse = csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=True)
        lines = BlockFile(_lines(path, layout))
        schema = csv.open_csv(lines, read_options=names, parse_options=parse).schema
        return read(dict.fromkeys(schema.names, pa.string()), newlines=True)


def _lines(path: Path, layout: _Layout) -> Iterator[bytes]:
    for block in blocks(path, comments=layout.comments):
        if layout.delimiter == " ":  # as many as align the columns
            block = re.sub(rb"(?m)^ +| +(?= |\r?$)", b"", block)
        yield block


def _layout(path: Path) -> _Layout:
    """See where the names of a CSV file's columns are and what parts them."""
    head = _head(path)
    if not head:
        raise InputError(f"{path} is not a readable CSV file (it is empty)")
    if re.fullmatch("(?i)sep=.", head[0]):  # a first line for Excel
        return _Layout(delimiter=head[0][-1], first=1)
    rows = [line for line in head if not COMMENT.match(line.encode())]
    if not rows or (len(head) > 1 and len(rows) == 1 and rows[0] == head[0]):
        return _Layout(delimiter=_delimiter(head[0]))  # values that begin with #, such as #1
    comments, above = len(rows) < len(head), head[: head.index(rows[0])]
    if above and (names := _names_above(above[-1], rows[0])):
        return _Layout(delimiter=_delimiter(above[-1]), names=names, comments=True)
    delimiter = _delimiter(rows[0])
    if all(_is_number(cell) for cell in _cells(rows[0], delimiter)):
        raise InputError(
            f"{path} has no line of column names: its first line is {rows[0][:60]!r}. Write one "
            "above it, such as params,tokens,loss"
        )
    return _Layout(delimiter=delimiter, comments=comments)


def _head(path: Path) -> list[str]:
    """The first lines that are not blank."""
    lines = (line.decode().strip() for block in blocks(path) for line in block.splitlines())
    return list(islice((line for line in lines if line), _HEAD_LINES))


def _names_above(comment: str, row: str) -> list[str] | None:
    """The names in a comment above the first row, if that is what it holds."""
    delimiter = _delimiter(comment)
    names, cells = _cells(comment.lstrip("# "), delimiter), _cells(row, delimiter)
    of_row = len(names) == len(cells) > 1 and any(_is_number(cell) for cell in cells)
    return names if of_row and not any(_is_number(name) for name in names) else None


def _delimiter(line: str) -> str:
    bare = re.sub('"[^"]*"', "", line).strip("# ")
    if not any(sign in bare for sign in ",;\t") and " " in bare:
        return " "
    return max(",;\t", key=bare.count)


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        line = " ".join(line.split())
    return [cell.strip() for cell in next(csv_cells([line], delimiter=delimiter), [])]


def _is_number(text: str) -> bool:
    try:
        read_number(text)
    except ValueError:
        return False
    return True


def _too_wide(path: Path) -> str:
    return (
        f"{path} has more than {MOST_COLUMNS:,} columns, the most that a table may have: keep "
        "those that are to be fitted"
    )


class _HardError(Exception):
    """JSON that Arrow's reader does not bear."""


def _json_lines(path: Path) -> pa.Table:
    options = pyarrow.json.ReadOptions(block_size=_JSON_BLOCK_BYTES)
    try:
        return pyarrow.json.read_json(BlockFile(_easy(blocks(path))), read_options=options)
    except (pa.ArrowInvalid, _HardError):  # values of several types, a long line, or no JSON
        return _of_records(_records(path), path)


def _easy(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield blocks of JSON lines unless they are nested deeply or have many names.

    Arrow's reader needs time in the square of the names, 7 s for 5,000 lines of one each, and ends
    the process by a segmentation fault where brackets are nested 20,000 deep.
    """
    names: set[bytes] = set()
    for block in parts:
        names.update(_NAME.findall(block))
        if len(names) > _EASY_NAMES or any(map(_is_deep, block.splitlines())):
            raise _HardError
        yield block


def _is_deep(line: bytes) -> bool:
    """Whether there are so many brackets in a line that it may be nested deeply."""
    if line.count(b"[") + line.count(b"{") <= _EASY_DEPTH:
        return False
    signs = np.frombuffer(line, np.uint8)
    opened = np.isin(signs, list(b"[{")).astype(np.int32)
    return bool(np.max(np.cumsum(opened - np.isin(signs, list(b"]}")))) > _EASY_DEPTH)


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    lines = (line for block in blocks(path) for line in block.splitlines())
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _parsed_json(line, f"{path}, line {number},")
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}, holds no JSON object: {line[:60]!r}")
            yield record


def _json(path: Path) -> pa.Table:
    """A list of objects, an object of lists, or an object a line under another name."""
    whole = b"".join(blocks(path, lines=False))
    first, _, more = whole.strip().partition(b"\n")
    if first.startswith(b"{") and first.endswith(b"}") and more:
        return _json_lines(path)
    if len(whole) > MOST_JSON_BYTES:
        raise InputError(
            f"{path} is {size_of(len(whole))} of JSON in one list, and at most "
            f"{size_of(MOST_JSON_BYTES)} are read as a whole: write an object a line, as .jsonl"
        )
    content = _parsed_json(whole, f"{path}")
    if isinstance(content, list) and all(isinstance(record, dict) for record in content):
        return _of_records(content, path)
    if isinstance(content, dict) and content:
        columns = list(content.values())
        if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return pa.table({name: _array(values) for name, values in content.items()})
    raise InputError(f"{path} holds no list of objects: write one object for each run")


def _parsed_json(text: bytes, where: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            require_distinct_names(pa.table([[0]] * len(pairs), names=[name for name, _ in pairs]))
        return record

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply to be read: mend or remove it") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise InputError(f"{where} is not readable JSON ({first_line(error)})") from error


def _of_records(records: Iterable[Mapping[str, Any]], path: Path) -> pa.Table:
    """A column a name, null where a record has none."""
    columns: dict[str, list[Any]] = {}
    rows = 0
    for record in records:
        for name, value in _flat(record):
            column = columns.setdefault(name, [])
            if len(columns) > MOST_COLUMNS:
                raise InputError(_too_wide(path))
            column += [None] * (rows - len(column))
            column.append(value)
        rows += 1
        if 8 * rows * len(columns) > MOST_TABLE_BYTES:
            raise InputError(
                f"{path} comes to more than {size_of(MOST_TABLE_BYTES)} with its {rows:,} rows of "
                f"{len(columns):,} columns, the most that a table may take in memory: keep those "
                "that are to be fitted"
            )
    filled = {name: values + [None] * (rows - len(values)) for name, values in columns.items()}
    return pa.table({name: _array(values) for name, values in filled.items()})


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several types
        text = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return pa.array(text, pa.string())


def read_parquet(
    files: Iterable[tuple[str, bytes]], columns: Sequence[str] | None = None
) -> pa.Table:
    """Read observation files into one table with `SCHEMA`'s columns.

    Parameters
    ----------
    files
        What each is called in errors, and its content.
    columns
        Only these; a thousand rows are read several times faster without their curves.

    Raises
    ------
    InputError
        If a file is cut short, is no Parquet file, or lacks one of `SCHEMA`'s columns.
    """
    schema = _schema(columns)
    tables = [_read_rows(name, data, schema) for name, data in files]
    return pa.concat_tables([schema.empty_table(), *tables])


def read_parquet_file(name: str, data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one observation file; see `read_parquet`, which takes longer for a single one."""
    return _read_rows(name, data, _schema(columns))


def _schema(columns: Sequence[str] | None) -> pa.Schema:
    return SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])


def _read_rows(name: str, data: bytes, schema: pa.Schema) -> pa.Table:
    try:
        opened = packed(name, data)
        with opened.file as file:
            found = file.schema_arrow
            there = set(found.names)
            missing = [n for n in SCHEMA.names if n not in there and n not in LATER]
            if not missing:
                # Choosing columns takes as long as reading them, so not where all are chosen.
                chosen = [n for n in schema.names if n in there] if schema != found else None
                table = opened.read(chosen, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{name} is not a readable Parquet file ({first_line(error)}): "
            "it was cut short or damaged; move it away and run the sweep again to measure it anew"
        ) from error
    if missing:
        raise InputError(
            f"{name} is not an isoflop observation: it lacks the columns {', '.join(missing)}"
        )
    return table if table.schema == schema else as_schema(table, name, schema)


def numbers(table: pa.Table, name: str) -> FloatArray:
    """One column as numbers, shape (n,); NaN where it has none.

    Text is read as `numerals.read_number` does, a comma in it as the whole column shows.

    Raises
    ------
    InputError
        If there is no such column, or several, or a value that is no number.
    """
    if name not in table.column_names:
        raise InputError(f"there is no column {name!r}; the columns are {listed(table)}")
    require_distinct_names(table, [name])
    column = table[name]
    kind = column.type
    if pa.types.is_string(kind):
        column = _parsed(column, name)
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise InputError(f"column {name!r} is not numeric: it holds {kind}")
    column = pc.cast(column, pa.float64(), safe=False)
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)


def _parsed(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    text = pc.if_else(pc.is_in(text, pa.array(MISSING)), None, text)
    try:
        return pc.cast(text, pa.float64())
    except pa.ArrowInvalid:
        coded = text.combine_chunks().dictionary_encode()
    values = coded.dictionary.to_pylist()
    mark = decimal_mark(values)
    parsed: list[float | None] = []
    reasons: dict[str, str] = {}
    for value in values:
        try:
            parsed.append(float(value) if _INFINITE.fullmatch(value) else read_number(value, mark))
        except ValueError as error:
            reasons[value] = str(error)
            parsed.append(None)
    if reasons:
        raise InputError(_unreadable(text, name, reasons))
    return pa.chunked_array([pa.array(parsed, pa.float64()).take(coded.indices)])


def _unreadable(text: pa.ChunkedArray, name: str, reasons: Mapping[str, str]) -> str:
    """Say which value of a column is no number, in which row, and how many others are none."""
    value, reason = next(iter(reasons.items()))
    row = pc.index(text, value).as_py() + 1
    more = pc.sum(pc.is_in(text, pa.array(list(reasons)))).as_py() - 1
    others = f" ({plural(more, 'more such row')})" if more else ""
    if "may be" in reason:
        return f"column {name!r}, row {row}{others}: {reason}"
    return (
        f"column {name!r} is not numeric: row {row} has {value!r}{others}; write plain numbers, "
        f"such as {EXAMPLES}"
    )


def listed(table: pa.Table) -> str:
    """The columns of a table, for an error."""
    return ", ".join(repr(name) if " " in name else name for name in table.column_names)
