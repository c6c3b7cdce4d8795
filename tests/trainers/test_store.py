"""Stored corpora: exactly the text, made once, whole or not at all."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import InputError
from trainers import corpus, documents
from trainers.corpus import Batches, Files, TokenizerSource, heldout_windows, load
from trainers.holdout import document_hash
from trainers.pretrain import Pretrain
from trainers.workspace import Scratch

BPE = TokenizerSource(train=1000)


def _stores(cache: Path) -> list[Path]:
    return [path for path in (cache / "corpora").iterdir() if path.is_dir()]


def _manifest(cache: Path) -> dict:
    (store,) = _stores(cache)
    return json.loads((store / "manifest.json").read_text())


def _again(source: Files) -> corpus.Corpus:
    corpus._loaded.cache_clear()
    return load(source)


def test_bytes_decode_to_every_document_once(cache: Path, jsonl: Path, texts: list[str]) -> None:
    made = load(Files(glob=str(jsonl)))
    every = made.train.tobytes() + made.heldout.tobytes()
    assert sorted(every.split(b"\n\n")) == sorted(t.strip().encode() for t in [*texts, ""])
    assert made.train.dtype == np.uint8
    assert made.bytes_per_token == 1.0
    manifest = _manifest(cache)
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 400
    assert len(every) == sum(len(t.encode()) + 1 for t in texts)
    assert manifest["train"]["hash"] == hashlib.sha256(made.train.tobytes()).hexdigest()
    counts = np.bincount(made.train, minlength=256) / len(made.train)
    np.testing.assert_allclose(made.frequencies, counts)


def test_bpe_decodes_to_every_document_once(cache: Path, jsonl: Path, texts: list[str]) -> None:
    source = Files(glob=str(jsonl), tokenizer=BPE)
    made = load(source)
    how = made.tokenizer
    assert how is not None
    text = how.decode(made.train) + how.decode(made.heldout)
    assert sorted(text.decode().split("<|endoftext|>")) == sorted([*texts, ""])
    assert made.train.dtype == np.uint16
    assert (made.vocabulary, made.train.max()) <= (1000, 999)
    held = [t for t in how.decode(made.heldout).decode().split("<|endoftext|>") if t]
    size = sum(len(text.encode()) + 1 for text in held)
    assert made.bytes_per_token == pytest.approx(size / len(made.heldout))
    assert 1.5 < made.bytes_per_token < 6


def test_the_same_documents_are_held_out_whatever_a_token_is(cache: Path, jsonl: Path) -> None:
    plain, source = load(Files(glob=str(jsonl))), Files(glob=str(jsonl), tokenizer=BPE)
    how = load(source).tokenizer
    assert how is not None
    text = how.decode(load(source).heldout)
    assert text.replace(b"<|endoftext|>", b"\n") == plain.heldout.tobytes()


def test_a_window_belongs_to_the_document_in_which_it_starts(cache: Path, jsonl: Path) -> None:
    made = load(Files(glob=str(jsonl)))
    held = heldout_windows(made, 64, 100)
    texts = made.heldout.tobytes().split(b"\n\n")
    for window, number in zip(held.windows, held.segment, strict=True):
        assert bytes(window[:1].astype(np.uint8)) in texts[number] + b"\n\n"
        start = bytes(window.astype(np.uint8)).split(b"\n")[0]
        assert start in texts[number]
    assert len(np.unique(held.segment)) > 20


def test_a_text_file_is_a_document_with_a_separator_at_its_end(cache: Path, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number} " * 300)
    made = load(Files(glob=str(tmp_path / "*.txt")))
    assert made.train.tobytes().count(b"\n") + made.heldout.tobytes().count(b"\n") == 60


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["bytes", BPE])
def test_processes_side_by_side_make_what_one_makes(
    choice: str, tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 50_000)
    source = Files(glob=str(jsonl), tokenizer=choice)
    made = []
    for processes in (1, 3):
        monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / str(processes)))
        monkeypatch.setattr("trainers.shards._cores", lambda count=processes: count)
        made.append(_again(source))
        assert (tmp_path / str(processes) / "corpora").exists()
    np.testing.assert_array_equal(made[0].train, made[1].train)
    np.testing.assert_array_equal(made[0].heldout, made[1].heldout)
    assert made[0].hashes == made[1].hashes


def test_equal_text_elsewhere_is_the_same_corpus(cache: Path, tmp_path: Path, jsonl: Path) -> None:
    first = load(Files(glob=str(jsonl)))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "again.jsonl").write_bytes(jsonl.read_bytes())
    assert load(Files(glob=str(tmp_path / "moved/*"))).hashes == first.hashes
    assert len(_stores(cache)) == 1


def test_a_stored_corpus_is_not_tokenised_again(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(Files(glob=str(jsonl)))
    monkeypatch.setattr(corpus, "build", None)
    assert _again(Files(glob=str(jsonl))).hashes == first.hashes


def test_named_heldout_sets_are_measured_and_not_trained_on(
    cache: Path, tmp_path: Path, jsonl: Path, texts: list[str]
) -> None:
    plain = load(Files(glob=str(jsonl)))
    trained = [t for t in plain.train.tobytes().decode().split("\n\n") if t][:5]
    web = tmp_path / "web.jsonl"
    web.write_text("".join(json.dumps({"text": f"{t}\n"}) + "\n" for t in trained))
    (tmp_path / "code.txt").write_text("def f():\n    return 1\n" * 50)
    sets = {"web": str(web), "code": str(tmp_path / "code.txt")}
    made = load(Files(glob=str(jsonl), heldout=sets))
    assert set(made.domains) == {"web", "code"}
    assert made.domains["web"].tokens.tobytes().decode() == "".join(f"{t}\n\n" for t in trained)
    assert len(made.domains["web"].starts) == 5
    for text in trained:
        assert text.encode() in plain.train.tobytes()
        assert text.encode() not in made.train.tobytes()
    assert len(plain.train) - len(made.train) == sum(len(t.encode()) + 2 for t in trained)
    assert made.hashes[1] != plain.hashes[1]
    windows = corpus.domain_windows(made.domains["code"], 16)
    assert windows.windows.shape == ((50 * 22 + 1 - 1) // 16, 17)


def test_unique_tokens_limit_training_alone(cache: Path, jsonl: Path) -> None:
    whole = load(Files(glob=str(jsonl)))
    cut = load(Files(glob=str(jsonl), unique_tokens=50_000))
    np.testing.assert_array_equal(cut.train, whole.train[:50_000])
    assert cut.train_tokens == 50_000
    assert cut.hashes[0] != whole.hashes[0]
    assert cut.hashes[1] == whole.hashes[1]
    with pytest.raises(InputError, match="fewer than its unique_tokens = 10,000,000"):
        load(Files(glob=str(jsonl), unique_tokens=10_000_000))


@pytest.mark.parametrize(
    "damage", ["short", "edited", "manifest", "documents", "gone", "starts", "counts", "trained"]
)
def test_a_store_that_is_not_as_its_manifest_says_is_made_again(
    cache: Path, jsonl: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Files(glob=str(jsonl))
    before = load(source)
    hashes, train = before.hashes, before.train.copy()
    (store,) = _stores(cache)
    if damage == "short":
        os.truncate(store / "train.bin", 1000)
    elif damage == "edited":
        with (store / "heldout.bin").open("r+b") as file:
            file.write(b"!!!")
    elif damage == "manifest":
        (store / "manifest.json").write_text('{"version": 1, "trai')
    elif damage == "documents":
        os.truncate(store / "heldout.npy", 40)
    elif damage == "starts":
        listed = np.load(store / "heldout.npy")
        listed["start"] = 0
        np.save(store / "heldout.npy", listed)
    elif damage == "counts":
        np.save(store / "counts.npy", np.load(store / "counts.npy")[::-1])
    elif damage == "trained":
        _zero(store / "trained.bin", 80)
    else:
        (store / "counts.npy").unlink()
    after = _again(source)
    np.testing.assert_array_equal(after.train, train)
    assert after.hashes == hashes
    assert "tokenising again" in capsys.readouterr().err
    assert _stores(cache) == [store]


def _zero(path: Path, size: int) -> None:
    """Zeros over the first bytes of a file, as a disk that failed may leave them."""
    with path.open("r+b") as file:
        file.write(bytes(size))


def test_a_long_file_is_hashed_once_a_machine_and_again_when_it_was_written(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainers.store.HASHED_BYTES", 1 << 16)
    monkeypatch.setattr(documents, "FRESH_NS", 0)
    train = load(Files(glob=str(jsonl))).train.copy()
    (store,) = _stores(cache)
    read: list[str] = []
    real = documents.file_hash
    monkeypatch.setattr(documents, "file_hash", lambda path: read.append(path.name) or real(path))
    _again(Files(glob=str(jsonl)))
    assert read == []
    _zero(store / "train.bin", 1000)
    np.testing.assert_array_equal(_again(Files(glob=str(jsonl))).train, train)
    assert "has train.bin with another hash than its manifest says" in capsys.readouterr().err
    assert read == ["train.bin", "train.bin"]  # the damaged one, and that made in its place


def test_text_that_changed_since_the_plan_is_refused_with_both_hashes(
    cache: Path, tmp_path: Path, jsonl: Path, make_trial
) -> None:
    trial = make_trial(8, 1e9, source=Files(glob=str(jsonl)))
    with jsonl.open("a") as file:
        file.write(json.dumps({"text": "one more " * 50}) + "\n")
    corpus._loaded.cache_clear()
    message = rf"here has (a held-out part of )?hash \w+, but .* planned with {trial.corpus.hash}"
    with pytest.raises(InputError, match=message):
        next(iter(Pretrain().train(trial, Scratch(tmp_path))))


def test_another_vocabulary_than_the_corpus_has_is_refused(
    cache: Path, tmp_path: Path, jsonl: Path, make_trial
) -> None:
    trial = make_trial(8, 1e9, source=Files(glob=str(jsonl), tokenizer=BPE))
    other = dataclasses.replace(trial.shape, vocabulary=256)
    with pytest.raises(InputError, match=r"has 1000 symbols, but trial \w+ has a vocabulary of 25"):
        next(iter(Pretrain().train(dataclasses.replace(trial, shape=other), Scratch(tmp_path))))


def test_a_file_that_changes_while_it_is_tokenised_is_refused(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = corpus.build

    def writing(*given: object, **told: object) -> None:
        build(*given, **told)
        jsonl.write_text(jsonl.read_text() + '{"text": "more"}\n')

    monkeypatch.setattr(corpus, "build", writing)
    with pytest.raises(InputError, match=r"texts\.jsonl changed while it was tokenised"):
        load(Files(glob=str(jsonl)))
    assert _stores(cache) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "taken"))
    with pytest.raises(InputError, match=r"cannot store tokens in .*set ISOFLOP_CACHE to another"):
        _again(Files(glob=str(jsonl)))


def test_a_bad_row_leaves_nothing_behind(cache: Path, jsonl: Path) -> None:
    with jsonl.open("a") as file:
        file.write('{"text": "x"')
    with pytest.raises(InputError, match=r"texts\.jsonl line 401 is no JSON"):
        load(Files(glob=str(jsonl)))
    assert _stores(cache) == []


def test_text_that_is_not_utf8_is_bytes_but_no_bpe(cache: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(b"caf\xe9 au lait\n" * 400)
    pattern = str(tmp_path / "*.txt")
    (tmp_path / "other.txt").write_bytes(b"something else\n" * 400)
    assert load(Files(glob=pattern)).vocabulary == 256
    with pytest.raises(InputError, match=r"\d+\.txt is not UTF-8 \(.*0xe9\): convert it, or set"):
        load(Files(glob=pattern, tokenizer=BPE))


def test_a_machine_that_shares_the_cache_without_locks_does_no_harm(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes first, while this one is at it: what it made is used."""
    build = corpus.build

    def slow(place: Path, *given: object, **told: object) -> None:
        build(place, *given, **told)
        shutil.copytree(place, place.with_name(place.name.split(".")[0]))

    monkeypatch.setattr(corpus, "build", slow)
    made = load(Files(glob=str(jsonl)))
    (store,) = _stores(cache)
    assert made.train.tobytes() == (store / "train.bin").read_bytes()


def test_batches_of_mapped_tokens_are_those_of_tokens_in_memory(cache: Path, jsonl: Path) -> None:
    made = load(Files(glob=str(jsonl), tokenizer=BPE))
    copied = corpus.Corpus("copy", 1000, np.array(made.train), np.array(made.heldout))
    for step in (0, 5, 900):
        mapped, plain = (
            Batches(c, context=32, sequences=4, seed=1).batch(step) for c in (made, copied)
        )
        np.testing.assert_array_equal(mapped, plain)
    assert made.train.base is not None  # a view of the file, not a copy


def test_the_hash_of_a_document_is_the_same_everywhere() -> None:
    assert document_hash(b"some text") == int(
        hashlib.blake2b(b"some text", digest_size=8).hexdigest(), 16
    )
