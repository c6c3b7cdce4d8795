"""Arrow tables with few types: text, float64, int64, true or false, timestamps.

Whoever wrote a table chose among some forty types of Arrow; what a column means does not depend on
the choice, so nothing behind this module sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.errors import InputError

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none", "#N/A")
"""Text read as a missing number in a numeric column; in a column of words only blanks are."""

_ALL_EXACT = 200_000  # rows up to which every float32 is read by its shortest decimals
_FEW = 1_000  # values of a longer column that make it one of settings, such as learning rates
_MOST_KEYS = 200  # of a map that is a run's settings, not its data


def plain_types(table: pa.Table, schema: pa.Schema | None = None) -> pa.Table:
    """The same table with columns of text, float64, int64, bool and timestamps alone.

    Dictionaries, views, extension types and run-end encoding give way to what they stand for;
    binary columns are text; decimals and short floats are the float64 that is written the same;
    dates and times of day are text, durations are seconds. Structs become a column a field, and
    maps a column a key, called `config.lr`. Lists are left out. In columns of text, spaces around
    values go, a blank is null, and a column that is all numbers or all true and false is read as
    in a CSV file. Names may repeat; metadata stays.

    Parameters
    ----------
    table
        Any table.
    schema
        Columns that it names keep their lists, and their text stays text.
    """
    fields: list[pa.Field] = []
    columns: list[pa.ChunkedArray] = []
    for field, column in zip(table.schema, table.columns, strict=True):
        kept = schema is not None and field.name in schema.names
        if kept and pa.types.is_nested(field.type):
            fields.append(field)
            columns.append(column)
            continue
        for name, part in _parts(field.name, column):
            plain = _plain(part, text=kept)
            if plain is not None:
                fields.append(pa.field(name, plain.type, metadata=field.metadata))
                columns.append(plain)
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=table.schema.metadata))


def labels(column: pa.ChunkedArray, *, blank_alone: bool) -> np.ndarray:
    """Label rows by their value in a column, shape (n,), from 0.

    Parameters
    ----------
    column
        Of a plain type.
    blank_alone
        Whether each row without a value has a label of its own; else they share one.
    """
    encoded = pc.dictionary_encode(column.combine_chunks())
    size, n = len(encoded.dictionary), len(column)
    blank = size + np.arange(n, dtype=np.int64) if blank_alone else np.full(n, size)
    known = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
    codes = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
    return np.where(known, codes, blank).astype(np.int64)


def counts_rows(column: pa.ChunkedArray) -> bool:
    """Whether a column holds whole numbers without gap or repetition, as row numbers do."""
    if not pa.types.is_integer(column.type) or column.null_count or len(column) < 2:
        return False
    ends = pc.min_max(column).as_py()
    gapless = ends["max"] - ends["min"] == len(column) - 1
    return bool(gapless and pc.count_distinct(column).as_py() == len(column))


def require_distinct_names(table: pa.Table, names: Iterable[str] | None = None) -> None:
    """Refuse a table in which several columns have one name.

    Parameters
    ----------
    table
        Any table.
    names
        Names that matter; by default all.

    Raises
    ------
    InputError
        With the first such name.
    """
    counts = Counter(table.column_names)
    for name in counts if names is None else names:
        if counts[name] > 1:
            number = "two" if counts[name] == 2 else str(counts[name])
            others = "one of them" if counts[name] == 2 else "all but one of them"
            raise InputError(f"{number} columns are called {name!r}: rename {others}")


def _parts(name: str, column: pa.ChunkedArray) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """A column, or those that it is made of, none of them a struct, a map or a wrapped one."""
    column = _unwrapped(column)
    kind = column.type
    if pa.types.is_struct(kind):
        for i, part in enumerate(column.flatten()):
            yield from _parts(f"{name}.{kind.field(i).name}", part)
    elif pa.types.is_map(kind):
        for key, part in _by_key(column):
            yield from _parts(f"{name}.{key}", part)
    else:
        yield name, column


def _by_key(column: pa.ChunkedArray) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """The values of each key of a map with few keys of text, in the order of their appearance."""
    kind = column.type.key_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        keys = pc.unique(pa.chunked_array([chunk.keys for chunk in column.chunks], kind))
        if len(keys) <= _MOST_KEYS:
            for key in keys:
                yield key.as_py(), pc.map_lookup(column, key, "first")


def _unwrapped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without views, dictionaries, run-end encoding and extension types."""
    chunks = column.chunks or [pa.nulls(0, column.type)]
    return pa.chunked_array([_unwrapped_array(chunk) for chunk in chunks])


def _unwrapped_array(array: pa.Array) -> pa.Array:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return _by_value(array, str, pa.string())
        storage = _unwrapped_array(array.storage)
        return storage.cast(pa.bool_()) if kind.extension_name == "arrow.bool8" else storage
    if pa.types.is_dictionary(kind):
        return _unwrapped_array(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy()
        run = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        part = run[array.offset : array.offset + len(array)]
        return _unwrapped_array(array.values).take(pa.array(part))
    if pa.types.is_string_view(kind):
        return _as(array, pa.string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return _as(array, pa.binary())
    return array


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return array.cast(kind)
    except pa.ArrowNotImplementedError:  # by older versions of Arrow
        return pa.array(array.to_pylist(), kind)


def _plain(column: pa.ChunkedArray, *, text: bool) -> pa.ChunkedArray | None:
    """A flat column as one of the few types, None where it holds what none of them can.

    Parameters
    ----------
    column
        Neither nested nor wrapped.
    text
        Whether text that is all numbers stays text.
    """
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_timestamp(kind) or pa.types.is_float64(kind):
        return column
    if pa.types.is_integer(kind):
        return _integers(column)
    if pa.types.is_floating(kind):
        return _as_written(column)
    if pa.types.is_decimal(kind):
        return _through_text(column)
    if pa.types.is_duration(kind):
        units = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
        return pc.divide(column.cast(pa.int64()).cast(pa.float64()), units[kind.unit])
    if pa.types.is_null(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        return column.cast(pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _words(column, text=text)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _words(column, text=text)
    return None


def _integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:  # beyond 2^63
        return column.cast(pa.float64(), safe=False)


def _as_written(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Short floats as the float64 of the same shortest decimals: 3e-4, not 3.00000014e-4.

    Only so does `--where lr=3e-4` select a float32. In a long column of many values, which are
    results and not settings, the difference of 1e-8 is not worth the time.
    """
    if len(column) <= _ALL_EXACT:
        return _through_text(column)
    if len(pc.unique(column.slice(0, _ALL_EXACT))) <= _FEW:
        coded = column.combine_chunks().dictionary_encode()
        values = _through_text(pa.chunked_array([coded.dictionary])).combine_chunks()
        return pa.chunked_array([values.take(coded.indices)])
    return column.cast(pa.float64())


def _through_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_float16(column.type):  # Arrow writes all digits of these
        return pa.chunked_array([_shortest(chunk) for chunk in column.chunks], pa.float64())
    return column.cast(pa.string()).cast(pa.float64())


def _shortest(halves: pa.Array) -> pa.Array:
    distinct, which = np.unique(halves.to_numpy(zero_copy_only=False), return_inverse=True)
    values = np.array([float(str(value)) for value in distinct])[which]
    return pa.array(values, mask=halves.is_null().to_numpy(zero_copy_only=False))


def _words(column: pa.ChunkedArray, *, text: bool) -> pa.ChunkedArray:
    """Text without spaces around it, null where blank; numbers where all of it is numbers."""
    try:
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except pa.ArrowInvalid:  # bytes that are no text: hashes, pictures, other encodings
        chunks = [chunk.cast(pa.binary()) for chunk in column.chunks]
        kept = [_by_value(chunk, _readable, pa.string()) for chunk in chunks]
        column = pc.utf8_trim_whitespace(pa.chunked_array(kept))
    blank = pc.equal(column, "")
    if pc.any(blank).as_py():
        column = pc.if_else(blank, None, column)
    return column if text else _inferred(column)


def _readable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _inferred(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers or true and false where all text of a column is that, as in reading CSV files."""
    words = pa.array(MISSING)
    first = _first(column.slice(0, _FEW), words)
    if first is not None and not _may_be_value(first):
        return column
    values = pc.if_else(pc.is_in(column, words), None, column)
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return values.cast(kind) if values.null_count < len(values) else values
        except pa.ArrowInvalid:
            continue
    return column


def _first(column: pa.ChunkedArray, words: pa.Array) -> str | None:
    """The first value that is not missing."""
    known = column.filter(pc.invert(pc.is_in(column, words))).drop_null()
    return str(known[0]) if len(known) else None


def _may_be_value(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _by_value(array: pa.Array, convert: Callable[[Any], object], kind: pa.DataType) -> pa.Array:
    """Convert each distinct value once."""
    values = array.to_pylist()
    converted = {value: None if value is None else convert(value) for value in set(values)}
    return pa.array([converted[value] for value in values], kind)
