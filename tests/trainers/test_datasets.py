"""Hugging Face datasets, from directories: taken up to a count, known by declaration."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from trainers import tokenizer_training
from trainers.corpus import (
    Files,
    HuggingFace,
    Mixture,
    TokenizerSource,
    declared_hash,
    load,
)
from trainers.holdout import document_hash, levels
from trainers.sources import LEAST_TOKENS
from trainers.tokenizer import Tokenizer, trained


@pytest.fixture
def dataset(tmp_path: Path, texts: list[str]) -> Path:
    """The texts, in two Parquet files."""
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pa.table({"body": texts[part * 200 : part * 200 + 200]})
        pq.write_table(table, tmp_path / "data" / f"train-{part}.parquet")
    return tmp_path / "data"


def _source(dataset: Path, **changes: object) -> HuggingFace:
    return HuggingFace(**{"dataset": str(dataset), "column": "body", "tokens": 300_000, **changes})


def test_the_first_documents_are_taken_and_as_many_tokens_as_were_planned(
    cache: Path, dataset: Path, texts: list[str]
) -> None:
    source = _source(dataset)
    made = load(source)
    assert len(made.train) == source.train_tokens == made.train_tokens
    held = [text for text in texts if text.encode() in made.heldout.tobytes()]
    trained = "\n".join(text for text in texts if text not in held).encode()
    assert made.train.tobytes() == trained[: len(made.train)]
    assert made.heldout.tobytes() == "".join(f"{text}\n" for text in held).encode()
    assert 280_000 < len(made.train) + len(made.heldout) < 340_000
    assert made.hashes == (declared_hash(source),) * 2


def test_with_a_tokenizer_tokens_are_its_own(cache: Path, dataset: Path) -> None:
    source = _source(dataset, tokens=160_000, tokenizer=TokenizerSource(train=600))
    made = load(source)
    how = made.tokenizer
    assert how is not None
    assert len(made.train) == source.train_tokens
    assert len(how.decode(made.train)) > 1.5 * len(made.train)
    assert made.vocabulary == 600


def test_fewer_tokens_than_declared_are_refused(cache: Path, dataset: Path) -> None:
    with pytest.raises(InputError, match=r"has 939,159 tokens of text, fewer than the tokens"):
        load(_source(dataset, tokens=10**9))


@pytest.mark.parametrize("order", ["as they come", "greatest hash first"])
def test_a_trained_tokenizer_sees_nothing_that_is_held_out(
    cache: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Of few documents, all of which fit into the sample and not all of which are taken."""
    long = ["".join(texts[n : n + 8]) for n in range(0, 160, 8)]
    if order == "greatest hash first":  # what is held out of the first is not the least of all
        long.sort(key=lambda text: document_hash(text.encode()), reverse=True)
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in long)
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    seen: list[str] = []

    def remembered(given: Iterator[str], *others: object) -> Tokenizer:
        seen.extend(given)
        return trained(iter(seen), *others)

    monkeypatch.setattr(tokenizer_training, "trained", remembered)
    choice = TokenizerSource(train=300)
    made = load(_source(tmp_path / "data", tokens=LEAST_TOKENS, tokenizer=choice))
    assert made.tokenizer is not None
    held = made.tokenizer.decode(made.heldout).decode().split("<|endoftext|>")[:-1]
    assert held
    assert set(held) <= set(long)
    assert not set(held) & set(seen)
    assert len(seen) >= 8


def test_unique_tokens_cut_what_is_planned(cache: Path, dataset: Path) -> None:
    whole, cut = load(_source(dataset)), load(_source(dataset, unique_tokens=20_000))
    np.testing.assert_array_equal(cut.train, whole.train[:20_000])
    assert cut.hashes != whole.hashes
    for made in (cut, whole):
        counts = np.bincount(made.train, minlength=256) / len(made.train)
        np.testing.assert_array_equal(made.frequencies, counts)
    with pytest.raises(ValueError, match=r"has unique_tokens = 999,999, but trains on 278,528"):
        _source(dataset, unique_tokens=999_999)


def test_another_column_is_named_with_those_there_are(cache: Path, dataset: Path) -> None:
    with pytest.raises(InputError, match=r"hf:.*data has no column 'text', but 'body': set column"):
        load(_source(dataset, column="text"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "nosuch"}, r"data \(split 'nosuch', revision 'main'\): .*nosuch"),
        ({"config": "nosuch"}, r"data \(config 'nosuch', split 'train', .*\): .*nosuch"),
        ({"dataset": "empty"}, r"empty \(split 'train', .*\): .*empty"),
        ({"dataset": "damaged"}, r"damaged \(split 'train', .*\): "),
    ],
)
def test_a_dataset_that_cannot_be_had_is_named_with_what_was_asked_of_it(
    cache: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    message: str,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 and no more")
    if "dataset" in changes:
        dataset, changes = tmp_path / changes["dataset"], {}
    source = replace(_source(dataset), **changes)
    with pytest.raises(InputError, match=rf"^cannot read the dataset .*{message}"):
        load(source)


def test_a_directory_that_is_not_there_is_named(cache: Path, tmp_path: Path) -> None:
    """When it is planned: its hash would be that of no files."""
    with pytest.raises(InputError, match=r"there is no directory .*/none, which a corpus names"):
        declared_hash(_source(tmp_path / "none"))


def test_a_stream_reads_on_for_what_another_part_holds_out(
    cache: Path, tmp_path: Path, dataset: Path, texts: list[str]
) -> None:
    """It has its tokens all the same. The other part, few documents, holds out others than it."""
    level = levels(np.array([document_hash(text.encode()) for text in texts], dtype=np.uint64))
    few = [text for text, zeros in zip(texts, level, strict=True) if zeros < 4][:90]
    rows = "".join(json.dumps({"body": text}) + "\n" for text in few)
    (tmp_path / "few.jsonl").write_text(rows)
    files = Files(glob=str(tmp_path / "few.jsonl"), column="body", name="few")
    stream = _source(dataset, name="stream")
    held = set(load(files).heldout.tobytes().split(b"\n\n")) - {b""}
    assert held & set(load(stream).train.tobytes().split(b"\n\n"))
    (_, one), (_, other) = load(Mixture(parts=(files, stream))).parts
    assert set(one.heldout.tobytes().split(b"\n\n")) - {b""} == held
    assert not held & set(other.train.tobytes().split(b"\n\n"))
    assert len(other.train) == stream.train_tokens


def test_a_revision_that_may_move_is_known() -> None:
    """A mixture's tokens are compared with those that it was planned with; a dataset's are not."""
    commit = "9bb295ddab0e05d785b879661af7260fed5140fc"
    hub = HuggingFace(dataset="a/b", tokens=300_000)
    assert hub.unpinned == ['revision = "main"']
    assert replace(hub, revision=commit).unpinned == []
    assert replace(hub, dataset="./b").unpinned == []
    pinned = replace(hub, revision=commit, tokenizer=TokenizerSource(hub="gpt2"))
    assert pinned.unpinned == ['tokenizer.revision = "main"']


def test_a_name_on_the_hub_is_not_mistaken_for_a_directory(
    cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library would read it; what its hash says does not depend on where it is computed."""
    named = replace(_source(dataset), dataset="data")
    elsewhere = declared_hash(named)
    monkeypatch.chdir(dataset.parent)
    assert declared_hash(named) == elsewhere
    with pytest.raises(InputError, match=r"dataset data is one on the hub, but .*write \./data"):
        load(named)


def test_without_the_library_the_command_that_installs_it_is_said(
    cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"is read by `datasets`.*pip install 'isoflop\[text\]'"):
        load(_source(dataset))


def test_the_declared_hash_is_of_all_that_decides_the_tokens(
    cache: Path, tmp_path: Path, dataset: Path
) -> None:
    (tmp_path / "web.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    sources = [
        _source(dataset),
        _source(dataset, tokens=LEAST_TOKENS),
        _source(dataset, unique_tokens=5),
        _source(dataset, tokenizer=TokenizerSource(train=300)),
        _source(dataset, heldout={"web": str(tmp_path / "web.jsonl")}),
    ]
    hashes = [declared_hash(source) for source in sources]
    (tmp_path / "web.jsonl").write_text(json.dumps({"body": "y"}) + "\n")
    hashes.append(declared_hash(sources[-1]))
    pq.write_table(pa.table({"body": ["more"]}), dataset / "train-2.parquet")
    hashes.append(declared_hash(sources[0]))
    # Another split; sorted by their names the files are in the same order.
    (dataset / "train-0.parquet").rename(dataset / "test-0.parquet")
    hashes.append(declared_hash(sources[0]))
    assert len(set(hashes)) == 8
    shutil.copytree(dataset, tmp_path / "elsewhere" / "copied")
    copied = replace(sources[0], dataset=str(tmp_path / "elsewhere" / "copied"))
    assert declared_hash(copied) == hashes[-1]
    named = replace(sources[0], name="mine", weight=2.0)
    assert declared_hash(named) == hashes[-1]
