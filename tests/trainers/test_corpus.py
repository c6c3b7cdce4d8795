"""Corpora: disjoint, pure, and with the entropy that they claim."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import InputError
from trainers.corpus import (
    SEGMENT,
    Batches,
    Corpus,
    Files,
    Markov,
    Stdlib,
    heldout_windows,
    load,
    windows_per_pass,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Two megabytes of text of which every 8 bytes are unique, in two files."""
    directory = tmp_path_factory.mktemp("text")
    for part in range(2):
        lines = [f"{i:07}\n" for i in range(part * 131_072, (part + 1) * 131_072)]
        (directory / f"{part}.txt").write_text("".join(lines))
    return directory


def _eights(tokens: np.ndarray) -> set[bytes]:
    data = tokens.tobytes()
    return {line for line in data.split(b"\n") if len(line) == 7}


def test_heldout_text_is_not_trained_on(text: Path) -> None:
    corpus = load(Files(glob=str(text / "*.txt")))
    assert 0.015 < len(corpus.heldout) / len(corpus.train) < 0.25
    assert not _eights(corpus.heldout) & _eights(corpus.train)
    assert len(_eights(corpus.heldout) | _eights(corpus.train)) == 2 * 131_072
    assert len(corpus.heldout) + len(corpus.train) == 2 * (131_072 * 8 + 1)  # and two separators


def test_stdlib_is_real_text_of_megabytes() -> None:
    corpus = load(Stdlib())
    assert len(corpus.train) > 5_000_000
    assert 0.05 < len(corpus.heldout) / len(corpus.train) < 0.08
    assert b"def __init__(self" in corpus.train.tobytes()
    assert 2.5 < corpus.unigram_entropy < np.log(256)


def test_a_pass_reads_every_window_once() -> None:
    """Bytes such that every pair of neighbours is unique: a window is known by how it starts."""
    tokens = _unique_pairs()
    corpus = Corpus("pairs", 256, tokens, tokens)
    place = {pair: i for i, pair in enumerate(pairwise(tokens.tolist()))}
    assert len(place) == len(tokens) - 1
    windows = windows_per_pass(len(tokens), 8)
    batches = Batches(corpus, context=8, sequences=7, seed=5)
    rows = np.concatenate([batches.batch(s) for s in range(-(-windows // 7))])[:windows]
    starts = sorted(place[int(row[0]), int(row[1])] for row in rows)
    assert np.diff(starts).tolist() == [8] * (windows - 1)
    assert starts[0] < 8
    assert starts[0] + windows * 8 + 8 > len(tokens) - 8
    for row, start in zip(rows, (place[int(r[0]), int(r[1])] for r in rows), strict=True):
        np.testing.assert_array_equal(row, tokens[start : start + 9])


def _unique_pairs() -> np.ndarray:
    """(a, a+k) for k = 1, 2, ...: a walk through the bytes whose steps never repeat."""
    steps = np.repeat(np.arange(1, 9, 2), 256)  # odd steps visit all 256 bytes
    return (np.concatenate([[0], np.cumsum(steps)]) % 256).astype(np.uint8)


def test_batches_are_a_pure_function_of_the_step() -> None:
    corpus = load(Stdlib())
    one = Batches(corpus, context=64, sequences=5, seed=3)
    forward = [one.batch(step) for step in range(6)]
    two = Batches(corpus, context=64, sequences=5, seed=3)
    for step in (4, 0, 5, 2):
        np.testing.assert_array_equal(two.batch(step), forward[step])
    other = Batches(corpus, context=64, sequences=5, seed=4)
    assert not np.array_equal(other.batch(0), forward[0])


def test_passes_differ_in_order_and_batches_may_straddle_them() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, 8 * 10 + 8).astype(np.uint8)
    batches = Batches(Corpus("tiny", 256, tokens, tokens), context=8, sequences=4, seed=0)
    rows = np.concatenate([batches.batch(step) for step in range(5)])
    first, second = rows[:10], rows[10:]
    assert len({tuple(r) for r in first}) == len({tuple(r) for r in second}) == 10
    assert not np.array_equal(first, second)


def test_markov_entropy_is_that_of_its_tokens() -> None:
    """Empirical conditional entropy converges to the exact rate, from below by (states k)/2n."""
    corpus = load(Markov(tokens=2_000_000, symbols=8, order=2, seed=1))
    tokens = np.concatenate([corpus.train, corpus.heldout]).astype(np.int64)
    state = tokens[:-2] * 8 + tokens[1:-1]
    counts = np.zeros((64, 8))
    np.add.at(counts, (state, tokens[2:]), 1)
    conditional = counts / counts.sum(1, keepdims=True)
    used = counts > 0
    empirical = -(counts[used] * np.log(conditional[used])).sum() / counts.sum()
    assert corpus.entropy_rate == pytest.approx(empirical, abs=0.003)


def test_heldout_windows_are_fixed_spread_and_numbered_by_segment() -> None:
    corpus = load(Stdlib())
    held = heldout_windows(corpus, 64, 256)
    assert held.windows.shape == (256, 65)
    assert len(np.unique(held.segment)) == len(corpus.heldout) // SEGMENT
    np.testing.assert_array_equal(held.windows, heldout_windows(corpus, 64, 256).windows)


def test_a_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches .*nothing\.txt"):
        load(Files(glob=str(tmp_path / "nothing.txt")))


def test_a_corpus_smaller_than_its_heldout_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("few words")
    with pytest.raises(InputError, match=r"has 10 tokens, fewer than the 147,456"):
        load(Files(glob=str(tmp_path / "small.txt")))


def test_a_context_longer_than_the_heldout_part_is_refused(text: Path) -> None:
    with pytest.raises(InputError, match="longer than the held-out part"):
        heldout_windows(load(Files(glob=str(text / "*.txt"))), 1_000_000)


def test_corpora_in_memory_are_the_tokens_that_they_always_were() -> None:
    """Hashes of before text was stored on disk; of trials in many ledgers."""
    corpus = load(Markov(tokens=300_000))
    assert corpus.hashes == ("93209e90044ed073", "6e5829ad4b4c7603")
    batches = Batches(corpus, context=16, sequences=4, seed=7)
    seen = np.stack([batches.batch(step) for step in (0, 3000, 9000)])
    assert hashlib.sha256(seen.tobytes()).hexdigest()[:16] == "9c6f9fd1d7b91ed8"


def test_unique_tokens_are_the_first_ones_and_change_the_hash() -> None:
    whole, cut = load(Stdlib()), load(Stdlib(unique_tokens=100_000))
    np.testing.assert_array_equal(cut.train, whole.train[:100_000])
    np.testing.assert_array_equal(cut.heldout, whole.heldout)
    assert cut.hashes[0] != whole.hashes[0]
    assert cut.hashes[1] == whole.hashes[1]
    with pytest.raises(InputError, match=r"fewer than its unique_tokens = 999,999,999: lower that"):
        load(Stdlib(unique_tokens=999_999_999))


def test_an_order_of_four_bytes_a_window_is_that_of_eight() -> None:
    """Trials were trained in the order of `permutation(n)`, which takes twice the memory."""
    for windows in (1, 2, 1000, 99_991):
        long = np.random.default_rng([3, 1]).permutation(windows)
        short = np.random.default_rng([3, 1]).permutation(np.arange(windows, dtype=np.uint32))
        np.testing.assert_array_equal(short, long)
