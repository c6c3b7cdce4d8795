"""Files as tables: somebody's CSV or Parquet, and our own rows. What they mean is for others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from analysis.errors import InputError, first_line
from analysis.observations import LATER, SCHEMA, FloatArray, as_schema, has_schema

SUFFIXES = (".csv", ".tsv", ".parquet")
_NULLS = ["", "NA", "N/A", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none", "#N/A"]


def read_table(path: Path) -> pa.Table:
    """Read a file, column names stripped of spaces around them.

    Commas, semicolons or tabs part the columns of a CSV file, whichever its first line has most of.

    Raises
    ------
    InputError
        If there is no such file, it is neither CSV nor Parquet by its name, or not readable as
        such, or it has no rows.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is neither .csv nor .parquet: convert it to one of them")
    try:
        table = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or ["empty"])[0]
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "CSV"
        raise InputError(f"{path} is not a readable {kind} file ({first})") from error
    if table.num_rows == 0:
        raise InputError(f"{path} has no rows: there is nothing to fit")
    return table.rename_columns([name.strip() for name in table.column_names])


def _parquet(path: Path) -> pa.Table:
    file = pq.ParquetFile(path)
    # Lists and structs, such as loss curves, are no numbers of a run and may be most of the file.
    flat = [f.name for f in file.schema_arrow if not pa.types.is_nested(f.type)]
    ours = has_schema(file.schema_arrow.names)
    return file.read(columns=None if ours else flat)


def _csv(path: Path) -> pa.Table:
    with path.open("rb") as file:
        lines = (line.decode("utf-8-sig").strip() for line in file)
        first = next((line for line in lines if line), "")
    delimiter = max(",;\t", key=first.count)
    parse = csv.ParseOptions(delimiter=delimiter)
    try:
        convert = csv.ConvertOptions(null_values=_NULLS)
        return csv.read_csv(path, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:
        # Types are told by the first block; what follows another one is left to `numbers`.
        names = csv.open_csv(path, parse_options=parse).schema.names
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        return csv.read_csv(path, parse_options=parse, convert_options=convert)


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
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    tables = [_read_rows(name, data, schema) for name, data in files]
    return pa.concat_tables([schema.empty_table(), *tables])


def _read_rows(name: str, data: bytes, schema: pa.Schema) -> pa.Table:
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            found = file.schema_arrow
            there = set(found.names)
            missing = [n for n in SCHEMA.names if n not in there and n not in LATER]
            if not missing:
                # Choosing columns takes as long as reading them, so not where all are chosen.
                chosen = [n for n in schema.names if n in there] if schema != found else None
                table = file.read(chosen, use_threads=False)
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

    Raises
    ------
    InputError
        If there is no such column, or several, or a value that is no number.
    """
    found = table.column_names.count(name)
    if found != 1:
        what = "no column" if found == 0 else f"{found} columns called"
        raise InputError(f"there is {what} {name!r}; the columns are {listed(table)}")
    column = table[name]
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = _parsed(column, name)
    elif pa.types.is_boolean(kind) or not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise InputError(f"column {name!r} is not numeric: it holds {kind}")
    column = pc.cast(column, pa.float64(), safe=False)
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)


def _parsed(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    text = pc.if_else(pc.is_in(text, pa.array(_NULLS)), None, text)
    try:
        return pc.cast(text, pa.float64())
    except pa.ArrowInvalid as error:
        values = pc.unique(text).drop_null().to_pylist()
        bad = next(value for value in values if not _is_number(value))
        row = pc.index(text, bad).as_py() + 1
        raise InputError(
            f"column {name!r} is not numeric: row {row} has {bad!r}; write plain numbers, "
            "such as 1.5e9"
        ) from error


def _is_number(text: str) -> bool:
    try:
        pc.cast(pa.scalar(text), pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def listed(table: pa.Table) -> str:
    """The columns of a table, for an error."""
    return ", ".join(repr(name) if " " in name else name for name in table.column_names)
