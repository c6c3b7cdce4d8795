"""Files as people and programs write them: types of Arrow, CSV, JSON, encodings, numbers."""

import datetime
import decimal
import gzip
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.arrow_types import plain_types, require_distinct_names
from analysis.errors import InputError
from analysis.files import is_table_file, numbers, read_table
from analysis.observations import SCHEMA, as_schema

WORDS = ["dense", "moe", None, "dense"]
VALUES = [3e-4, 0.1, None, 3e-4]


def _chunked(values: list, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the values in two chunks, each with its own dictionary if the type has one."""
    return pa.chunked_array([pa.array(values[:1], kind), pa.array(values[1:], kind)])


def _of_dictionary(values: list, kind: pa.DataType) -> pa.ChunkedArray:
    chunks = []
    for part in (values[:1], values[1:]):
        distinct = [v for v in dict.fromkeys(part) if v is not None]
        indices = pa.array([None if v is None else distinct.index(v) for v in part], pa.int8())
        chunks.append(pa.DictionaryArray.from_arrays(indices, pa.array(distinct, kind)))
    return pa.chunked_array(chunks)


def _of_runs(values: list, kind: pa.DataType) -> pa.ChunkedArray:
    ends = pa.array(range(1, len(values) + 1), pa.int32())
    whole = pa.RunEndEncodedArray.from_arrays(ends, pa.array(values, kind))
    return pa.chunked_array([whole.slice(0, 1), whole.slice(1)])


TEXT_TYPES: dict[str, Callable[[list], pa.ChunkedArray]] = {
    **{
        str(kind): lambda values, kind=kind: _chunked(values, kind)
        for kind in (pa.string(), pa.large_string(), pa.string_view())
    },
    **{
        str(kind): lambda values, kind=kind: _chunked([v and v.encode() for v in values], kind)
        for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    },
    **{
        f"dictionary of {kind}": lambda values, kind=kind: _of_dictionary(values, kind)
        for kind in (pa.string(), pa.large_string(), pa.string_view())
    },
    "runs": lambda values: _of_runs(values, pa.string()),
    "runs of views": lambda values: _of_runs(values, pa.string_view()),
    "json": lambda values: pa.chunked_array(
        [pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))]
    ),
    "blanks": lambda values: _chunked([v or "  " for v in values], pa.string()),
    "padded": lambda values: _chunked([v and f" {v} " for v in values], pa.string()),
}

NUMBER_TYPES: dict[str, Callable[[list], pa.ChunkedArray]] = {
    **{
        str(kind): lambda values, kind=kind: _chunked(values, kind)
        for kind in (pa.float64(), pa.float32())
    },
    "half": lambda values: _chunked([v and np.float16(v) for v in values], pa.float16()),
    **{
        str(kind): lambda values, kind=kind: _chunked(
            [v and decimal.Decimal(str(v)) for v in values], kind
        )
        for kind in (pa.decimal128(20, 5), pa.decimal256(60, 20))
    },
    "text": lambda values: _chunked([v and str(v) for v in values], pa.string_view()),
    "text with None": lambda values: _chunked([str(v) for v in values], pa.string()),
    "dictionary": lambda values: _of_dictionary(values, pa.float64()),
    "dictionary of text": lambda values: _of_dictionary(
        [v and str(v) for v in values], pa.large_string()
    ),
    "runs": lambda values: _of_runs(values, pa.float32()),
}


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_words_are_text_whatever_their_type(name: str) -> None:
    plain = plain_types(pa.table({"arch": TEXT_TYPES[name](WORDS)}))
    assert plain.schema.field("arch").type == pa.string()
    assert plain["arch"].to_pylist() == WORDS


@pytest.mark.parametrize("name", NUMBER_TYPES)
def test_numbers_are_the_same_floats_whatever_their_type(name: str) -> None:
    plain = plain_types(pa.table({"lr": NUMBER_TYPES[name](VALUES)}))
    assert plain.schema.field("lr").type == pa.float64()
    assert plain["lr"].to_pylist() == VALUES
    np.testing.assert_array_equal(numbers(plain, "lr"), [3e-4, 0.1, np.nan, 3e-4])


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint32(), pa.uint64()])
def test_integers_are_of_one_type(kind: pa.DataType) -> None:
    plain = plain_types(pa.table({"seed": _chunked([1, 2, None], kind)}))
    assert plain.schema.field("seed").type == pa.int64()
    assert plain["seed"].to_pylist() == [1, 2, None]


def test_integers_beyond_64_bits_are_floats() -> None:
    plain = plain_types(pa.table({"flops": pa.array([2**63, 1], pa.uint64())}))
    assert plain["flops"].to_pylist() == [2.0**63, 1.0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([True, None, False]),
        pa.array(["True", None, "False"]),
        pa.array(["true", "", "false"], pa.string_view()),
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
        pa.array([True, None, False]).dictionary_encode(),
    ],
    ids=["bool", "text", "view", "bool8", "dictionary"],
)
def test_true_and_false_are_of_one_type(column: pa.Array) -> None:
    assert plain_types(pa.table({"tied": column}))["tied"].to_pylist() == [True, None, False]


def test_times_and_other_types_of_values() -> None:
    day = datetime.date(2026, 11, 30)
    table = pa.table(
        {
            "day": pa.array([day], pa.date32()),
            "time": pa.array([datetime.time(12, 30)], pa.time64("us")),
            "at": pa.array([datetime.datetime(2026, 11, 30)], pa.timestamp("ms", "UTC")),
            "took": pa.array([datetime.timedelta(seconds=90)], pa.duration("ms")),
            "nothing": pa.nulls(1),
            "id": pa.array([uuid.UUID(int=7).bytes], pa.uuid()),
            "hash": pa.array([b"\xff\x00"], pa.binary(2)),
            "span": pa.array([pa.MonthDayNano([1, 2, 3])]),
        }
    )
    plain = plain_types(table)
    assert plain.drop_columns(["at"]).to_pylist() == [
        {
            "day": "2026-11-30",
            "time": "12:30:00.000000",
            "took": 90.0,
            "nothing": None,
            "id": "00000000-0000-0000-0000-000000000007",
            "hash": "\\xff\x00",
        }
    ]
    assert plain.schema.field("at").type == pa.timestamp("ms", "UTC")


def test_nested_columns_are_named_by_their_path() -> None:
    arch = pa.array(["a", "b"]).dictionary_encode()
    config = pa.StructArray.from_arrays(
        [pa.array([1e-3, 2e-3]), arch, pa.array([[1], [2]])],
        names=["lr", "arch", "sizes"],
        mask=pa.array([False, True]),
    )
    maps = pa.array([[("bs", 8.0)], [("lr", 1.0), ("bs", 4.0)]], pa.map_(pa.string(), pa.float64()))
    outer = pa.StructArray.from_arrays([config], names=["config"])
    plain = plain_types(pa.table({"run": outer, "sweep": maps, "curve": [[1.0], [2.0]]}))
    assert plain.to_pylist() == [
        {"run.config.lr": 1e-3, "run.config.arch": "a", "sweep.bs": 8.0, "sweep.lr": None},
        {"run.config.lr": None, "run.config.arch": None, "sweep.bs": 4.0, "sweep.lr": 1.0},
    ]


def test_metadata_and_repeated_names_stay() -> None:
    schema = pa.schema([pa.field("l", pa.float32(), metadata={"unit": "bits"}), ("l", pa.int8())])
    plain = plain_types(
        pa.Table.from_arrays([pa.array([1.5]).cast("f4"), pa.array([1]).cast("i1")], schema=schema)
    )
    assert plain.column_names == ["l", "l"]
    assert plain.schema.field(0).metadata == {b"unit": b"bits"}


def test_our_own_rows_keep_their_lists_and_their_keys(tmp_path: Path) -> None:
    point = {"step": 1, "tokens": 2, "flops": 3.0, "train_loss": 4.0, "heldout_loss": 5.0}
    row = dict.fromkeys(SCHEMA.names) | {"trial": "12e4567", "tokens": 8, "curve": [point]}
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    views = table.set_column(0, "trial", table["trial"].cast(pa.string_view()))
    path = tmp_path / "rows.parquet"
    pq.write_table(views, path)
    assert as_schema(read_table(path), "rows").equals(table)


def test_types_in_parquet_survive_the_way_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    config = pa.array([{"lr": 1e-3, "sizes": [1], "opt": {"name": "adamw"}}] * 2)
    table = pa.table({"arch": pa.array(["a", "b"], pa.string_view()), "config": config})
    pq.write_table(table.append_column("curve", pa.array([[1.0]] * 2)), path)
    assert read_table(path).to_pylist() == [
        {"arch": name, "config.lr": 1e-3, "config.opt.name": "adamw"} for name in "ab"
    ]


ROWS = [("a b", 1e8, 2e9, 3.25), ("c", 2e8, 2e9, 3.0)]
CSV = "name,params,tokens,loss\na b,1e8,2e9,3.25\nc,200000000,2000000000,3\n"
PACKED = gzip.compress(CSV.encode(), mtime=0)
JSON_LINES = "".join(
    json.dumps({"name": name, "params": n, "tokens": d, "loss": loss}) + "\n"
    for name, n, d, loss in ROWS
)
LONG = "x" * 5_000_000
FILES = {
    "comments.csv": "# made by hand\n#\n" + CSV.replace("c,2", "# 1,2,3,4\nc,2") + "# the end",
    "above.csv": "# made by hand\n# " + CSV,
    "savetxt.csv": "#" + CSV,
    "spaces.csv": "# name params tokens loss\n a_b  1e8 2e9  3.25 \nc 2e8 2e9 3.0\n",
    "excel.csv": "sep=;\n" + CSV.replace(",", ";"),
    "decimals.csv": CSV.replace(",", ";").replace("3.25", "3,25").replace(";3\n", ";3,0\n"),
    "thousands.csv": CSV.replace("1e8", '"100,000,000"').replace("200000000,", '"200,000,000",'),
    "suffixes.csv": CSV.replace("1e8", "100M").replace("200000000,", "0.2B,"),
    "mark.csv": "\ufeff" + CSV,
    "sixteen.csv": CSV.encode("utf-16"),
    "packed.csv.gz": PACKED,
    "packed.csv": PACKED,
    "tabs.tsv.gz": gzip.compress(CSV.replace(",", "\t").encode()),
    "old.csv": CSV.replace("\n", "\r\n"),
    "runs.jsonl": JSON_LINES,
    "mark.ndjson": "\ufeff" + JSON_LINES,
    "packed.jsonl.gz": gzip.compress(JSON_LINES.encode()),
    "mixed.jsonl": JSON_LINES.replace("3.25", '"3.25"').replace("3.0", "3"),
    "nan.jsonl": JSON_LINES + '{"name": "d", "params": 1, "tokens": 2, "loss": NaN}\n',
    "wide.jsonl": JSON_LINES.replace("}", f', "text": "{LONG}"}}', 1),
    "list.json": json.dumps([json.loads(line) for line in JSON_LINES.splitlines()], indent=1),
    "columns.json": json.dumps(
        {
            name: [row[i] for row in ROWS]
            for i, name in enumerate(("name", "params", "tokens", "loss"))
        }
    ),
    "lines.json": JSON_LINES,
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_programs_write_them(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert is_table_file(path)
    table = read_table(path)
    assert table["name"].to_pylist()[:2] in (["a b", "c"], ["a_b", "c"])
    for i, column in enumerate(("params", "tokens", "loss"), start=1):
        assert numbers(table, column)[:2].tolist() == [row[i] for row in ROWS]


def test_labels_that_begin_with_a_hash_are_no_comments(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run,params\n#1,1e8\n#2,2e8\n")
    assert read_table(path)["run"].to_pylist() == ["#1", "#2"]
    path.write_text("params,run\n1e8,a\n#N/A,b\n")
    assert read_table(path)["params"].to_pylist() == [1e8, None]


def test_a_value_of_several_lines_may_lie_where_a_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = "".join(f'{i},"two\nlines, {i}"\n' for i in range(100_000))
    path.write_text("params,note\n" + rows)
    table = read_table(path)
    assert table.num_rows == 100_000
    assert numbers(table, "params").tolist() == list(range(100_000))


@pytest.mark.parametrize("name", ["runs.csv", "runs.csv.gz"])
def test_another_encoding_is_named_with_its_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = CSV + "n,1,2,3\n" * 300_000 + "größe,1e8,2e9,3\n"
    data = text.encode("cp1252")
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(InputError, match=r"line 300004 has the byte 0xf6.*iconv -f WINDOWS-1252"):
        read_table(path)


def test_utf_16_without_a_mark_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(CSV.encode("utf-16-le"))
    with pytest.raises(InputError, match=r"zero bytes.*iconv -f UTF-16LE -t UTF-8 "):
        read_table(path)


def test_a_line_of_names_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("1e8,2e9,3.1\n2e8,2e9,3.0\n")
    with pytest.raises(
        InputError, match=r"no line of column names: its first line is '1e8,2e9,3.1"
    ):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("runs.jsonl", '{"a": 1}\n{"a": \n', "line 2, is not readable JSON"),
        ("runs.jsonl", '{"a": 1}\n[1]\n', r"line 2, holds no JSON object: b'\[1\]'"),
        ("runs.json", '{"a": 1}', "holds no list of objects"),
        ("runs.json", "[1, 2]", "holds no list of objects"),
        ("runs.json", "[", "is not readable JSON"),
        ("runs.json", "[]", "has no rows"),
        ("runs.csv.gz", b"\x1f\x8bno gzip", "not a readable CSV file"),
        ("runs.csv.gz", PACKED[:40], "not a readable CSV file"),
        ("runs.jsonl", '{"loss": 1, "loss": 2}\n', "two columns are called 'loss': rename one"),
        ("runs.json", '[{"loss": 1, "loss": 2}]', "two columns are called 'loss': rename one"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_table(path)


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path: Path) -> None:
    csv, parquet = tmp_path / "runs.csv", tmp_path / "runs.parquet"
    csv.write_text("params,loss, loss ,x,x,x\n1e8,3,4,1,2,3\n")
    table = read_table(csv)
    pq.write_table(table, parquet)
    for read in (table, read_table(parquet)):
        assert numbers(read, "params").tolist() == [1e8]
        with pytest.raises(InputError, match="two columns are called 'loss': rename one of them"):
            numbers(read, "loss")
        with pytest.raises(InputError, match="3 columns are called 'x': rename all but one"):
            require_distinct_names(read, ["params", "x"])
        with pytest.raises(InputError, match="'loss'"):
            require_distinct_names(read)


@pytest.mark.parametrize(
    ("values", "numbers_read"),
    [
        (["100k", "1.2B", "", "70m"], [1e5, 1.2e9, np.nan, 7e7]),
        (["1,234", "1,234,567", "None", "5"], [1234.0, 1234567.0, np.nan, 5.0]),
        (["3,661", "3,5", "12,25", "0,125"], [3.661, 3.5, 12.25, 0.125]),
        (["1.234.567", "1.234", "12,5", "7"], [1234567.0, 1234.0, 12.5, 7.0]),
        (["2 PF-days", "1e18", "6 EFLOPs", "inf"], [1.728e20, 1e18, 6e18, np.inf]),
    ],
)
def test_a_column_of_text_is_read_as_people_write_numbers(values, numbers_read) -> None:
    read = numbers(plain_types(pa.table({"x": values})), "x")
    np.testing.assert_array_equal(read, numbers_read)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1e8", "big", "big", "huge"], r"row 2 has 'big' \(2 more such rows\); write plain numb"),
        (["big", "1"], r"row 1 has 'big'; write plain numbers, such as 1500000000, 1.5e9 or 1.5B"),
        (["3,661", "3,532", ""], r"'x', row 1 \(1 more such row\): '3,661' may be 3661 or 3.661"),
        (["12,5", "1.5", "2,345"], "row 3: '2,345' may be 2345 or 2.345"),
        (["12 GB", "1"], "row 1 has '12 GB'"),
    ],
)
def test_what_is_no_number_is_quoted_back_with_its_row(values, message: str) -> None:
    with pytest.raises(InputError, match=message):
        numbers(plain_types(pa.table({"x": values})), "x")


def test_a_million_rows_of_every_kind_take_twice_their_size(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), 1_000_000
    columns: dict[str, pa.Array] = {f"metric{i}": pa.array(rng.random(rows)) for i in range(15)}
    arch = np.array(["dense", "moe", "hybrid"])[rng.integers(0, 3, rows)]
    columns |= {
        "arch": pa.array(arch),
        "kind": pa.array(arch).dictionary_encode(),
        "view": pa.array(arch).cast(pa.string_view()),
        "lr": pa.array(np.array([1e-3, 3e-4], np.float32)[rng.integers(0, 2, rows)]),
        "loss": pa.array(rng.random(rows).astype(np.float32)),
        "name": pa.array([f"run-{i}" for i in range(rows)]),
        "numbers": pa.array([str(i) for i in range(rows)]),
        "tied": pa.array(rng.random(rows) < 0.5),
        "seed": pa.array(rng.integers(0, 9, rows).astype(np.int32)),
        "at": pa.array(np.arange(rows), pa.timestamp("s")),
    }
    path = tmp_path / "runs.parquet"
    pq.write_table(pa.table(columns), path)
    before = pa.total_allocated_bytes()
    table = read_table(path)
    assert table["lr"].to_pylist()[:9] == [
        pytest.approx(v, abs=0.0) for v in np.round(columns["lr"].to_numpy()[:9].astype(float), 7)
    ]
    assert table.num_columns == 25
    assert pa.total_allocated_bytes() - before < 2.2 * table.nbytes
