"""Corpora of a few kilobytes that stand for gigabytes end with a sentence, in bounded memory."""

import gzip
import json
import multiprocessing
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.bounds import size_of
from analysis.errors import InputError
from tests.bombs import gzip_file, parquet_file, repeated
from trainers.documents import kind_of, read, units

MEMORY = 3 << 30
"""Address space of a process that reads a bomb, with that of the libraries that it has loaded."""
LIMIT = 300
"""Seconds for it on a machine that is busy."""


def _read_all(path: Path, column: str, answer: multiprocessing.Queue) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        n = sum(
            len(document.text)
            for unit in units([path], column)
            for span in unit
            for document in read(span, column)
        )
        answer.put(f"read {n} bytes")
    except InputError as error:
        answer.put(str(error))
    except BaseException as error:
        answer.put(f"ended by {error!r}")


def _refusal(path: Path, column: str = "text") -> str:
    """What a process of little memory says of a corpus."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_read_all, args=(path, column, answer))
    process.start()
    try:
        message = str(answer.get(timeout=LIMIT))
    finally:
        process.kill()
        process.join()
    assert str(path) in message, message
    assert not message.startswith("ended by"), message
    return message


def _parquet(path: Path, column: pa.Array, **options: object) -> Path:
    return parquet_file(path, {"text": column}, **options)


def test_a_text_that_is_repeated_in_a_parquet_file_is_refused(tmp_path: Path) -> None:
    """Below a kilobyte, and 5 GB of text; the reviewer's bomb."""
    path = _parquet(tmp_path / "bomb.parquet", repeated("x" * 20_000_000, 256))
    assert path.stat().st_size < 1000
    assert "256 MiB" in _refusal(path)


def test_a_document_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "long.parquet", pa.array(["x" * (150 << 20)]))
    message = _refusal(path)
    assert "128 MiB" in message
    assert ".txt" in message


def test_a_page_that_unpacks_to_gigabytes_is_refused_by_the_footer(tmp_path: Path) -> None:
    path = _parquet(
        tmp_path / "page.parquet", pa.array(["x" * (100 << 20)] * 4), use_dictionary=False
    )
    assert path.stat().st_size < 1 << 20
    assert "256 MiB" in _refusal(path)


def test_rows_of_nothing_are_counted_by_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    nothing = pa.table({"text": pa.nulls(4_000_000, pa.string())})
    with pq.ParquetWriter(path, nothing.schema) as writer:
        for _ in range(3):
            writer.write_table(nothing)
    assert "12,000,000 rows" in _refusal(path)


def test_a_line_of_gigabytes_in_a_small_gzip_is_refused(tmp_path: Path) -> None:
    block = b"x" * (1 << 20)
    path = gzip_file(tmp_path / "line.jsonl.gz", [b'{"text": "', *[block] * 1500, b'"}\n'])
    assert path.stat().st_size < 2 << 20
    message = _refusal(path)
    assert "line 1 " in message
    assert "256 MiB" in message


def test_many_lines_of_a_small_gzip_are_refused(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * (8 << 20)}).encode() + b"\n"
    path = gzip_file(tmp_path / "lines.jsonl.gz", [line] * 200)
    message = _refusal(path)
    assert "unpacks to more than" in message
    assert size_of(path.stat().st_size) in message


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.jsonl"
    with path.open("wb") as file:
        file.truncate(20 << 30)  # zeros, which take no room on the disk
    assert "256 MiB" in _refusal(path)


def test_what_is_legitimate_stays(tmp_path: Path) -> None:
    """Few texts that occur often, a long document, and much empty text in a small file."""
    words = pa.array(["yes", "no"] * 100_000).dictionary_encode()
    many = _parquet(tmp_path / "many.parquet", words)
    long = _parquet(tmp_path / "long.parquet", pa.array(["word " * 2_000_000, "short"]))
    packed = tmp_path / "packed.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        for _ in range(2000):
            file.write(json.dumps({"text": "the same line again " * 50}) + "\n")
    sizes = {many: 500_000, long: 10_000_005, packed: 2_000_000}
    for path, size in sizes.items():
        spans = [span for unit in units([path], "text") for span in unit]
        assert kind_of(path) in ("parquet", "jsonl.gz")
        assert sum(len(d.text) for span in spans for d in read(span, "text")) == size


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", None])
def test_rows_are_read_alike_in_every_encoding(tmp_path: Path, encoding: str | None) -> None:
    texts = [f"{'prefix' * (i % 50)} {i}" for i in range(3000)]
    options = {"use_dictionary": encoding is None}
    if encoding is not None:
        options["column_encoding"] = {"text": encoding}
    path = _parquet(tmp_path / "texts.parquet", pa.array(texts), row_group_size=700, **options)
    spans = [span for unit in units([path], "text") for span in unit]
    assert len(spans) == 5
    assert [d.text.decode() for span in spans for d in read(span, "text")] == texts


def test_a_shared_beginning_is_unpacked_a_row_at_a_time(tmp_path: Path) -> None:
    """DELTA_BYTE_ARRAY tells a value by what it shares with the one before."""
    path = _parquet(
        tmp_path / "shared.parquet",
        pa.array(["x" * (8 << 20)] * 200),
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert path.stat().st_size < 1 << 20
    assert "256 MiB" in _refusal(path)


def test_the_header_of_a_dictionary_is_read_right(tmp_path: Path) -> None:
    from analysis.packed import open_packed

    for size in (10, 1000, 3_000_000):
        path = _parquet(tmp_path / f"{size}.parquet", repeated("x" * size, 10))
        opened = open_packed(path)
        chunk = opened.file.metadata.row_group(0).column(0)
        assert opened._dictionary_bytes(chunk) == size + 4  # a length of four bytes before it
        assert opened.rows_at_once([0], ["text"], most=256) == min(256, (64 << 20) // (size + 4))
