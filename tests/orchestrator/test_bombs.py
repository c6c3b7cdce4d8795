"""Sweep files and tables that ask for gigabytes end with a sentence, in bounded memory."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.bounds import MOST_ROWS, MOST_TABLE_BYTES
from analysis.files import read_table
from analysis.observations import SCHEMA
from orchestrator.spec import read_spec
from tests.bombs import gzip_file, parquet_file, repeated

MEMORY = 4 << 30
"""Address space of a command that reads a bomb, with that of the libraries that it loads."""
LIMIT = 300
"""Seconds that it may take on a machine that is busy."""
SWEEP = 'name = "s"\ntrainer = "simulated"\nbudgets = [1e10]\n'
SHAPES = f"{SWEEP}[shapes]\n"


RUN = """
import contextlib, io, json, sys
from orchestrator.cli import main
for arguments in json.load(sys.stdin):
    sys.argv, err = ["isoflop", *arguments], io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, err.getvalue()]), flush=True)
"""
"""Runs the command line several times in one process: starting one takes seconds."""


def _refusals(*commands: list[object]) -> list[str]:
    """The one sentence with which the real command line ends each time, in little memory."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([[str(argument) for argument in command] for command in commands]),
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands), (done.returncode, done.stderr[-2000:])
    for code, err in answers:
        assert code == 2, err
        assert err.startswith("isoflop: ")
        assert err.count("\n") == 1
        assert len(err) < 1000
    return [err for _, err in answers]


def _refusal(*arguments: object) -> str:
    return _refusals(list(arguments))[0]


SWEEPS = [
    (f"{SWEEP}sizes = 1000000000\n", ["sizes", "1000000000", "1000"]),
    (f"{SWEEP}sizes = {'9' * 400}\n", ["sizes", "1000"]),
    (f"{SWEEP}sizes = {'9' * 5000}\n", ["thousands of digits"]),
    (f"{SWEEP}x = {'[' * 20000}{']' * 20000}\n", ["nested"]),
    (f"{SWEEP}x = {'{a=' * 20000}1{'}' * 20000}\n", ["nested"]),
    (f"{SWEEP}{'.'.join('a' * 20000)} = 1\n", ["nested"]),
    (f"[{'.'.join('a' * 20000)}]\n{SWEEP}", ["nested"]),
    (f"{SWEEP}seeds = {list(range(100_000))}\n", ["700,000", "100,000"]),
    (SWEEP.replace("1e10", ",".join(f"1{i:07}e6" for i in range(50_000))), ["350,000"]),
    (f"{SHAPES}depth = 1000000000\nheads = 2\n", ["shapes.depth", "1000000000", "10000"]),
    (f"{SHAPES}aspect = 1e-300\nheads = 2\n", ["shapes.aspect", "1e-300", "0.01"]),
    (f"{SHAPES}depth = 2\nheads = 1000000000\n", ["heads"]),
    (f"{SHAPES}depth = 2\nheads = 2\nwidth_multiple = 10000000\n", ["width_multiple"]),
    (f"{SWEEP}[cluster]\ncpus_per_node = 8\nnodes = 1000000000\n", ["nodes", "20000"]),
    (f"{SWEEP}[cluster]\ngpu = 'H100'\ngpus_per_node = 1000000000\n", ["gpus_per_node"]),
    (f"{SWEEP}[simulated]\npoints = 1000000000\n", ["points", "100000"]),
    (
        'name = "s"\nbudgets = [1e9]\n[corpus]\nkind = "markov"\ntokens = 1000000000000\n',
        ["tokens = 1,000,000,000,000", "2,000,000,000"],
    ),
]
"""What a sweep file asks for, and what is said of it."""


def test_a_sweep_file_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.toml" for i in range(len(SWEEPS))]
    for path, (text, _) in zip(paths, SWEEPS, strict=True):
        path.write_text(text)
    messages = _refusals(*(["plan", path] for path in paths))
    for message, (_, words) in zip(messages, SWEEPS, strict=True):
        assert all(word in message for word in words), message


def test_a_sweep_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    with sweep.open("wb") as file:
        file.truncate(20 << 30)  # zeros, which take no room on the disk
    assert "10,485,760" in _refusal("plan", sweep)


def test_a_sweep_file_with_long_words_is_read_at_once(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f"{SWEEP}# {'a' * 4_000_000} {'b.' * 30} {'x' * 2_000_000}\n")
    assert read_spec(sweep).name == "s"


def test_rows_of_a_parquet_table_are_counted_by_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"params": pa.array([1e6]).take(pa.array([0] * 3_000_000))})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(10):
            writer.write_table(table)
    assert path.stat().st_size < 1 << 20
    message = _refusal("fit", path)
    assert str(path) in message
    assert "30,000,000 rows" in message
    assert f"{MOST_ROWS:,}" in message


def test_a_text_that_is_repeated_in_a_table_is_counted_as_it_unpacks(tmp_path: Path) -> None:
    path = parquet_file(
        tmp_path / "text.parquet",
        {"params": pa.array([1e6] * 256), "note": repeated("x" * 20_000_000, 256)},
    )
    assert path.stat().st_size < 5000
    assert "2 GiB" in _refusal("fit", path)


def test_a_curve_that_is_repeated_in_a_row_is_refused(tmp_path: Path) -> None:
    """A row as a ledger has it, with a curve of equal points without end."""
    path = tmp_path / "rows.parquet"
    kind = SCHEMA.field("curve").type
    points = pa.repeat(pa.scalar({}, kind.value_type), 4_000_000)
    curve = pa.ListArray.from_arrays(pa.array([0, len(points)], pa.int32()), points)
    row = pa.Table.from_pylist([{"trial": "0" * 16, "tokens": 1}], schema=SCHEMA)
    place = SCHEMA.get_field_index("curve")
    row = row.set_column(place, SCHEMA.field("curve"), curve)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for _ in range(15):
            writer.write_table(row)
    assert path.stat().st_size < 1 << 20
    assert "2 GiB" in _refusal("fit", path)


def test_a_small_gzip_of_gigabytes_is_refused(tmp_path: Path) -> None:
    rows = (b"1000000,1000000000,3," + b"x" * 200 + b"\n") * 5000
    path = gzip_file(tmp_path / "rows.csv.gz", [b"params,tokens,loss,note\n", *[rows] * 1500])
    assert path.stat().st_size < 8 << 20
    assert "unpacks to more than" in _refusal("fit", path)


@pytest.mark.parametrize("name", ["line.csv.gz", "line.jsonl.gz"])
def test_a_line_of_gigabytes_is_refused(tmp_path: Path, name: str) -> None:
    start = b"params,tokens,loss\n1e6,1e9," if "csv" in name else b'{"params": 1e6, "x": "'
    path = gzip_file(tmp_path / name, [start, *[b"3" * (1 << 20)] * 1000])
    message = _refusal("fit", path)
    assert str(path) in message
    assert "64 MiB" in message


def test_json_that_is_nested_deeply_ends_no_process(tmp_path: Path) -> None:
    """Arrow's reader ends it by a segmentation fault, at 20,000 brackets."""
    paths = []
    for name, deep in (
        ("list", "[" * 100_000 + "]" * 100_000),
        ("object", '{"a":' * 100_000 + "1" + "}" * 100_000),
    ):
        row = f'{{"params": {deep}}}'
        paths += [tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"]
        paths[-2].write_text(f"{row}\n")
        paths[-1].write_text(f"[{row}]")
    assert all("nested" in message for message in _refusals(*(["fit", path] for path in paths)))


def test_another_name_in_every_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.jsonl"
    path.write_text("".join(f'{{"k{i}": 1}}\n' for i in range(20_000)))
    assert "10,000 columns" in _refusal("fit", path)


def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "digits.json"
    path.write_text(f'[{{"params": {"9" * 5000}, "tokens": 1, "loss": 3}}]')
    assert "digits" in _refusal("fit", path)


def test_what_is_legitimate_is_read_as_it_is(tmp_path: Path) -> None:
    """Two million rows with repeated words, curves beside them, brackets in words, many names."""
    n = 2_000_000
    words = pa.array(["adam", "muon"] * (n // 2)).dictionary_encode()
    rows = {"params": pa.array(range(n)), "optimizer": words}
    table = read_table(parquet_file(tmp_path / "rows.parquet", rows))
    assert table.num_rows == n
    assert table["optimizer"].slice(n - 2).to_pylist() == ["adam", "muon"]
    assert table.nbytes < MOST_TABLE_BYTES / 20

    brackets = tmp_path / "brackets.jsonl"
    records = [{"params": i, "note": "[{" * 200, "deep": [[[i]]]} for i in range(10)]
    brackets.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = read_table(brackets)
    assert found["note"].to_pylist() == ["[{" * 200] * 10

    names = tmp_path / "names.jsonl"
    record = {"params": 1, **{f"metric {i}": i for i in range(3000)}}
    names.write_text(f"{json.dumps(record)}\n" * 20)
    found = read_table(names)
    assert (found.num_rows, found.num_columns) == (20, 3001)


@pytest.mark.parametrize("group", [1000, 100_000])
def test_a_table_is_the_same_read_whole_or_in_parts(tmp_path: Path, group: int) -> None:
    """Long words of a dictionary make it be read in parts; structs and nulls come through."""
    n = 3000
    columns = {
        "name": pa.array([f"{'x' * 100_000}{i % 7}" if i % 5 else None for i in range(n)]),
        "inner": pa.array([{"size": i, "text": str(i)} for i in range(n)]),
    }
    path = parquet_file(tmp_path / "rows.parquet", columns, row_group_size=group)
    found = read_table(path)
    assert found["inner.size"].to_pylist() == list(range(n))
    assert found["name"].to_pylist() == columns["name"].to_pylist()
