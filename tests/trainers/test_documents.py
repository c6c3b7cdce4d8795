"""Files as documents: every one once, in order, and errors that say where."""

import gzip
import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from trainers import documents
from trainers.documents import PIECE_BYTES, content_hashes, files, read, units


def _read(path: Path, column: str = "text") -> list[documents.Document]:
    return [d for unit in units([path], column) for span in unit for d in read(span, column)]


def _rows(path: Path) -> list[str]:
    return [document.text.decode() for document in _read(path)]


@pytest.mark.parametrize("unit", [1000, 65_536, 1 << 23])
def test_rows_are_read_once_and_in_order_whatever_a_unit_is(
    unit: int, jsonl: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", unit)
    assert _rows(jsonl) == texts


def test_the_suffix_says_how_rows_are_read(tmp_path: Path, jsonl: Path, texts: list[str]) -> None:
    packed, table = tmp_path / "texts.jsonl.gz", tmp_path / "texts.parquet"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    pq.write_table(pa.table({"text": texts, "id": range(400)}), table, row_group_size=37)
    assert _rows(packed) == _rows(table) == texts
    jsonl.rename(tmp_path / "texts.md")
    assert "".join(_rows(tmp_path / "texts.md")) == (tmp_path / "texts.md").read_text()


@pytest.mark.parametrize("line", ["wörter in einer Zeile\n", "é", "中文", "🙂"])
def test_a_long_text_is_cut_at_lines_or_characters(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(line * (300_000 // len(line.encode())))
    pieces = _read(path)
    assert b"".join(piece.text for piece in pieces) == path.read_bytes()
    assert len(pieces) == -(-path.stat().st_size // PIECE_BYTES)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for piece in pieces[:-1]:
        assert piece.text.decode().endswith(line if "\n" in line else tuple(line))
        assert abs(len(piece.text) - PIECE_BYTES) < 30
    monkeypatch.setattr(documents, "UNIT_BYTES", PIECE_BYTES)
    assert _read(path) == pieces


def test_a_text_without_an_end_of_line_for_long_is_whole_characters(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("é" * 100_000 + "\n" + "line\n" * 10_000 + "中" * 60_000)
    pieces = _read(path)
    assert "".join(piece.text.decode() for piece in pieces) == path.read_text()


def test_no_character_is_cut_at_the_end_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "end.txt"
    for ahead in (1, 2):  # bytes of the last character before where a cut would be
        path.write_text("x" * (PIECE_BYTES - ahead) + "中")
        assert [len(piece.text) for piece in _read(path)] == [PIECE_BYTES - ahead + 3]


@pytest.mark.parametrize("size", [PIECE_BYTES * 3 + 7, (8 << 20) + PIECE_BYTES + 5])
def test_bytes_without_lines_or_characters_are_cut_all_the_same(tmp_path: Path, size: int) -> None:
    """0x85 ends a line in EBCDIC and Latin-1, and is the inside of a character in UTF-8."""
    path = tmp_path / "no.txt"
    path.write_bytes(b"\x85" * size)
    pieces = _read(path)
    assert [len(piece.text) for piece in pieces[:-1]] == [PIECE_BYTES] * (len(pieces) - 1)
    assert sum(len(piece.text) for piece in pieces) == size


def test_empty_rows_and_lines_and_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}')
    assert _read(tmp_path / "a.txt") == []
    assert _rows(tmp_path / "b.jsonl") == ["", "", "x"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"line 1703 is no JSON: Expecting ',' delimiter"),
        ("\xff", r"line 1703 is no JSON: "),
        ('{"body": "x", "id": 1}', r"line 1703 has no column 'text', but 'body', 'id': set column"),
        ("[1, 2]", r"line 1703 is a list, but it should be an object"),
        ('{"text": 3}', r"line 1703 has a int in column 'text', and text is needed"),
        ('{"text": "\\ud83d"}', r"line 1703 has half of a surrogate pair"),
        pytest.param("[" * 200_000, r"line 1703 is nested too deeply to be read", id="brackets"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(
    tmp_path: Path, packed: bool, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 4096)
    good = json.dumps({"text": "good"})
    lines = [good] * 1701 + ["", line] + [good] * 50
    content = "\n".join(lines).encode("latin-1")
    path = tmp_path / ("bad.jsonl.gz" if packed else "bad.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=rf"bad\.jsonl(\.gz)? {message}"):
        _read(path)


def test_a_cut_off_archive_is_named(tmp_path: Path, jsonl: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl.read_bytes())[:-1000])
    with pytest.raises(InputError, match=r"cannot unpack .*cut\.jsonl\.gz: .*is it whole\?"):
        _read(path)


def test_parquet_that_is_none_or_has_another_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet as Parquet"):
        _read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has no column 'txt', but 'body', 'text'"):
        _read(tmp_path / "b.parquet", "txt")
    with pytest.raises(InputError, match=r"b\.parquet row 1 has a int in column 'text'"):
        _read(tmp_path / "b.parquet")


def test_text_in_other_archives_is_refused_rather_than_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "c4.json.gz").touch()
    with pytest.raises(InputError, match=r"c4\.json\.gz is compressed, which is read of \.jsonl"):
        files(str(tmp_path / "*"))


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "big.txt", tmp_path / "hashes"
    path.write_bytes(b"a" * (2 << 20))
    old = time.time_ns() - 10**10
    os.utime(path, ns=(old, old))
    first = content_hashes([path], cache)
    path.write_bytes(b"b" * (2 << 20))
    os.utime(path, ns=(old, old))
    assert content_hashes([path], cache) == first  # not read again
    (kept,) = cache.iterdir()
    kept.write_text("[")
    assert content_hashes([path], cache) != first  # nor is what cannot be read believed
    os.utime(path, ns=(old + 1, old + 1))
    path.write_bytes(b"c" * (2 << 20))
    assert content_hashes([path], cache) == [hashlib.sha256(b"c" * (2 << 20)).hexdigest()]


def test_the_hash_of_a_file_that_is_being_written_is_not_remembered(tmp_path: Path) -> None:
    path, cache = tmp_path / "big.txt", tmp_path / "hashes"
    path.write_bytes(b"a" * (2 << 20))
    now = path.stat().st_mtime_ns
    first = content_hashes([path], cache)
    path.write_bytes(b"b" * (2 << 20))
    os.utime(path, ns=(now, now))  # within one tick of the file system's clock
    assert content_hashes([path], cache) != first
