"""Tokens are those of the library, and a trained tokenizer is the same everywhere."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from analysis.errors import InputError
from trainers import corpus, store, tokenizer_training
from trainers.corpus import Files, TokenizerSource, load, vocabulary
from trainers.origins import origins_of
from trainers.tokenizer import BYTES, Tokenizer, pretrained, trained
from trainers.tokenizer_training import fitting_tokenizer, sample


def _library(texts: list[str], size: int, special: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer as other people make them."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    return made


@pytest.fixture
def foreign(tmp_path: Path, texts: list[str]) -> Path:
    made = _library(texts, 600, ["[PAD]", "</s>"])
    made.enable_truncation(10)  # as many published files do
    made.enable_padding(length=4000)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_gives_the_numbers_that_the_library_gives(
    cache: Path, foreign: Path, jsonl: Path, texts: list[str]
) -> None:
    source = Files(glob=str(jsonl), tokenizer=TokenizerSource(file=str(foreign)))
    made = load(source)
    library = tokenizers.Tokenizer.from_file(str(foreign))
    library.no_truncation()
    library.no_padding()
    assert made.vocabulary == vocabulary(source) == library.get_vocab_size()
    end = library.token_to_id("</s>")
    wanted = {(*library.encode(t, add_special_tokens=False).ids, end) for t in texts}
    found = set()
    for part in (made.train, made.heldout):
        for document in np.split(part, np.flatnonzero(part == end) + 1)[:-1]:
            found.add(tuple(document.tolist()))
    assert found == wanted


def test_a_separator_can_be_named_and_must_be_there(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "odd.json"
    _library(texts, 400, ["[THE END]"]).save(str(path))
    assert pretrained(TokenizerSource(file=str(path), separator="[THE END]")).separator == 0
    with pytest.raises(InputError, match=r"has no token .* such as \[THE END\]"):
        pretrained(TokenizerSource(file=str(path)))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        pretrained(TokenizerSource(file=str(path)))
    path.write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json of the library"):
        pretrained(TokenizerSource(file=str(path)))


def test_without_the_library_the_command_that_installs_it_is_said(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"not installed here: pip install 'isoflop\[text\]'"):
        load(Files(glob=str(jsonl), tokenizer=TokenizerSource(train=300)))
    assert load(Files(glob=str(jsonl))).vocabulary == 256


def test_any_text_comes_back_from_its_tokens(texts: list[str]) -> None:
    made = trained(iter(texts), 700, None)
    for text in ("", " ", "\r\n\ttabs", "🙂 中文 ÿ\x00", "<|endoftext|> in text", " spaces  "):
        tokens = made.encode([text.encode()])[0]
        assert made.separator not in tokens
        assert made.decode(tokens) == text.encode()
        assert BYTES.decode(BYTES.encode([text.encode()])[0]) == text.encode()


def test_a_vocabulary_that_the_text_cannot_fill_keeps_its_size() -> None:
    assert trained(iter(["few words"]), 5000, None).vocabulary == 5000


@pytest.mark.parametrize(
    ("symbols", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4")]
)
def test_tokens_are_as_wide_as_the_vocabulary_needs(symbols: int, dtype: str) -> None:
    made = Tokenizer(definition=None, vocabulary=symbols, separator=0)
    assert made.dtype.str.endswith(dtype)
    assert np.iinfo(made.dtype).max >= symbols - 1


def _by_word(words: dict[str, int]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    return made


def test_more_than_65536_symbols_are_stored_whole(cache: Path, tmp_path: Path) -> None:
    """A word-level tokenizer of which every word has a number of its own."""
    words = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000, "?": 70_001}
    _by_word(words).save(str(tmp_path / "words.json"))
    rows = [{"text": " ".join(f"w{n}" for n in range(s, s + 1000))} for s in range(0, 70_000, 1000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    made = load(Files(glob=str(path), tokenizer=TokenizerSource(file=str(tmp_path / "words.json"))))
    assert made.train.dtype == np.uint32
    every = np.concatenate([made.train, made.heldout])
    assert np.bincount(every).tolist() == [3] * 70_000 + [210]


@pytest.mark.slow
def test_a_trained_tokenizer_is_the_same_in_every_process(tmp_path: Path, jsonl: Path) -> None:
    script = (
        "import sys; from trainers.corpus import *; "
        "print(load(Files(glob=sys.argv[1], tokenizer=TokenizerSource(train=900))).tokenizer)"
    )
    seen = set()
    for threads in ("1", "4"):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "ISOFLOP_CACHE": str(tmp_path / threads),
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
        }
        command = [sys.executable, "-c", script, str(jsonl)]
        seen.add(subprocess.run(command, env=environment, capture_output=True).stdout)
    assert len(seen) == 1
    assert seen != {b""}


def test_a_tokenizer_is_trained_on_training_documents_alone(
    cache: Path, tmp_path: Path, jsonl: Path, texts: list[str]
) -> None:
    """Of a sample of all of it, exactly those; of a smaller one, some of those."""
    (tmp_path / "web.jsonl").write_text(json.dumps({"text": texts[7]}) + "\n")
    source = Files(glob=str(jsonl), heldout={"web": str(tmp_path / "web.jsonl")})
    used = {text for text in load(source).train.tobytes().split(b"\n\n") if text}
    (origin,) = origins_of(source)
    excluded = np.array([], dtype=np.uint64)
    everything = {t.rstrip(b"\n") for t in sample(origin, 1 << 30, excluded)}
    assert everything - {texts[7].encode().rstrip()} == used - {texts[7].encode().rstrip()}
    few = {t.rstrip(b"\n") for t in sample(origin, 100_000, excluded)}
    assert 20 < len(few) < 80
    assert few <= everything


def _again(source: Files) -> Tokenizer | None:
    corpus._loaded.cache_clear()
    return load(source).tokenizer


def test_a_trained_tokenizer_is_kept_and_a_damaged_one_is_trained_again(
    cache: Path, jsonl: Path
) -> None:
    source = Files(glob=str(jsonl), tokenizer=TokenizerSource(train=500))
    first = _again(source)
    (kept,) = (cache / "tokenizers").glob("*.json")
    kept.write_text(kept.read_text()[:1000])
    assert _again(source) == first
    assert _again(source) == first
    assert json.loads(kept.read_text())["model"]["type"] == "BPE"


def test_of_several_that_want_a_tokenizer_one_trains_it_and_the_others_wait(
    cache: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One training lasts until the other has said that it waits."""
    source = TokenizerSource(train=400)
    origins = origins_of(Files(glob=str(jsonl), tokenizer=source))
    trainings, waits = [], threading.Event()

    def slow(*given: object) -> Tokenizer:
        trainings.append(given)
        assert waits.wait(20), "nobody waits"
        return trained(*given)

    def say(*text: str, **_: object) -> None:
        assert "another process trains this tokenizer; waiting for it" in text[0]
        waits.set()

    monkeypatch.setattr(tokenizer_training, "trained", slow)
    monkeypatch.setattr(store, "print", say, raising=False)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fitting_tokenizer, source, origins, [1.0], {}) for _ in range(2)]
        assert both[0].result() == both[1].result()
    assert len(trainings) == 1


@pytest.mark.parametrize("how", ["lower case", "unknown words", "no line ends", "no such letters"])
def test_text_that_tokens_lose_has_no_bits_per_byte(
    cache: Path, tmp_path: Path, texts: list[str], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their losses are of less than the bytes that they would be divided by."""
    made = _library(texts, 600, ["</s>"])
    if how == "lower case":
        made.normalizer = normalizers.Lowercase()
    elif how == "unknown words":
        words = {word: number for number, word in enumerate({*" ".join(texts[:9]).split(), "?"})}
        made = _by_word(words | {"</s>": len(words)})
    elif how == "no line ends":
        made.normalizer = normalizers.Replace("\n", " ")
    else:
        made = tokenizers.Tokenizer(models.BPE({"</s>": 0, "t": 1, " ": 2}, []))
    made.save(str(tmp_path / "lossy.json"))
    path = tmp_path / "Texts.jsonl"
    path.write_text("".join(json.dumps({"text": text.title()}) + "\n" for text in texts * 2))
    found = load(
        Files(
            glob=str(path),
            tokenizer=TokenizerSource(file=str(tmp_path / "lossy.json")),
        )
    )
    assert found.bytes_per_token is None
    assert "in lines that its tokens do not give back" in capsys.readouterr().err


def test_what_a_common_tokenizer_changes_is_no_loss(
    cache: Path, foreign: Path, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """NFC, as in GPT-NeoX, changes few lines; a space is added before each text, as in Llama 2."""
    made = tokenizers.Tokenizer.from_file(str(foreign))
    made.normalizer = normalizers.NFC()
    made.save(str(foreign))
    path = tmp_path / "texts.jsonl"
    apart = "".join(json.dumps({"text": f"{text}\n"}) + "\n" for text in texts)
    path.write_text(apart + json.dumps({"text": "e\u0301 in two\n"}) + "\n")
    found = load(Files(glob=str(path), tokenizer=TokenizerSource(file=str(foreign))))
    assert found.bytes_per_token is not None
    assert found.bytes_per_token > 1
    assert capsys.readouterr().err == ""
