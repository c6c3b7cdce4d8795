"""What a source says does not depend on the types in which its columns are held."""

import decimal
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from analysis.study_json import to_json
from orchestrator.reading import Convention, Reading
from orchestrator.source import open_source

BUDGET = np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7)
PARAMS = np.round(np.sqrt(BUDGET / 120) * np.tile(np.geomspace(0.25, 4, 7), 4))
TOKENS = np.round(BUDGET / (6 * PARAMS))
WORSE = np.where(np.arange(28) % 2 == 0, 1.004, 1.0)  # a difference that is told, not refused
LOSS = np.round((1.69 + 406.4 * PARAMS**-0.34 + 410.7 * TOKENS**-0.28) * WORSE, 5)
ARCH = ["dense" if i % 2 else "moe" for i in range(28)]
RATE = [1e-3 if i % 4 else 3e-4 for i in range(28)]

Column = pa.Array | pa.ChunkedArray


def _table(words: Callable[[list], Column], numbers: Callable[[list], Column]) -> pa.Table:
    columns = {"params": PARAMS, "tokens": TOKENS, "loss": LOSS, "lr": np.array(RATE)}
    counted = {name: numbers(values.tolist()) for name, values in columns.items()}
    return pa.table({**counted, "arch": words(ARCH), "notes": words(["8 GPUs", *[""] * 27])})


def _plain(values: list) -> Column:
    return pa.array(values)


def _decimals(values: list) -> Column:
    return pa.array([decimal.Decimal(str(value)) for value in values], pa.decimal128(38, 6))


def _chunks(values: list) -> Column:
    """Return the values in two chunks, each with its own dictionary."""
    return pa.chunked_array(
        [pa.array(part).dictionary_encode() for part in (values[:5], values[5:])]
    )


WORDS: dict[str, Callable[[list], Column]] = {
    "string": _plain,
    "large_string": lambda values: pa.array(values, pa.large_string()),
    "string_view": lambda values: pa.array(values, pa.string_view()),
    "category": lambda values: pa.array(values).dictionary_encode(),
    "categories in chunks": _chunks,
    "binary": lambda values: pa.array([value.encode() for value in values]),
    "nulls": lambda values: pa.array([value or None for value in values]),
}
NUMBERS: dict[str, Callable[[list], Column]] = {
    "float64": _plain,
    "decimal": _decimals,
    "text": lambda values: pa.array([str(value) for value in values], pa.large_string()),
    "category": lambda values: pa.array(values).dictionary_encode(),
}


def _said(path: Path) -> str:
    """The notes and the JSON of a fit."""
    source = open_source(str(path), Reading())
    study = source.study(Convention(), heldout=0)
    return json.dumps([source.notes, dict(source.excluded), to_json(study)])


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("usual") / "runs.parquet"
    pq.write_table(_table(_plain, _plain), path)
    said = _said(path)
    assert "arch" in said
    assert "--where" in said
    assert "8 GPUs" not in said
    return said


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_type_changes_nothing(words: str, numbers: str, tmp_path: Path, usual: str) -> None:
    path = tmp_path / "runs.parquet"
    pq.write_table(_table(WORDS[words], NUMBERS[numbers]), path)
    assert _said(path) == usual


def test_a_file_format_changes_nothing(tmp_path: Path, usual: str) -> None:
    table = _table(_plain, _plain)
    csv.write_csv(table, tmp_path / "runs.csv")
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    (tmp_path / "runs.jsonl").write_text(lines)
    for name in ("runs.csv", "runs.jsonl"):
        assert _said(tmp_path / name) == usual
