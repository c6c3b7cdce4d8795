"""What is held out: by text alone, about a sixteenth, never too little."""

import numpy as np
import pytest

from trainers.holdout import MAX_HELDOUT_BYTES, document_hash, levels, split


def _hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def test_levels_are_leading_zeros() -> None:
    some = [*_hashes(1000).tolist(), 2**64 - 1, 2**63, 2**63 - 1, 2**60, 2**60 - 1, 2**32]
    wanted = [64 - int(value).bit_length() for value in some]
    assert levels(np.array(some, dtype=np.uint64)).tolist() == wanted
    assert levels(np.array([0, 1, 2**32 - 1], dtype=np.uint64)).tolist() == [32, 32, 32]


def test_a_sixteenth_of_many_documents_is_held_out() -> None:
    hashes = _hashes(20_000)
    share = split(hashes, np.full(20_000, 1000)).heldout(hashes).mean()
    assert share == pytest.approx(1 / 16, abs=3 * (15 / 256 / 20_000) ** 0.5)


def test_what_is_held_out_stays_so_when_documents_are_added() -> None:
    hashes = _hashes(20_000)
    before = split(hashes[:15_000], np.full(15_000, 1000)).heldout(hashes)
    after = split(hashes, np.full(20_000, 1000)).heldout(hashes)
    np.testing.assert_array_equal(before, after)


def test_of_a_large_corpus_a_part_of_the_sixteenth_is_held_out() -> None:
    hashes = _hashes(50_000)
    small = split(hashes, np.full(50_000, 1000)).heldout(hashes)
    large = split(hashes, np.full(50_000, 30_000)).heldout(hashes)
    assert MAX_HELDOUT_BYTES / 3 < large.sum() * 30_000 <= MAX_HELDOUT_BYTES
    assert not (large & ~small).any()


@pytest.mark.parametrize("seed", range(20))
def test_of_few_documents_some_are_held_out_and_most_are_not(seed: int) -> None:
    hashes = _hashes(8, seed)
    sizes = np.random.default_rng(seed).integers(1000, 4000, 8)
    held = split(hashes, sizes).heldout(hashes)
    assert 0 < (sizes * held).sum() <= sizes.sum() / 4


def test_equal_documents_are_on_the_same_side() -> None:
    hashes = np.repeat(_hashes(6), 3)
    held = split(hashes, np.full(18, 100)).heldout(hashes).reshape(6, 3)
    assert held.any()
    assert (held.all(axis=1) == held.any(axis=1)).all()


def test_nothing_is_held_out_of_one_document() -> None:
    hashes = np.array([document_hash(b"all there is")], dtype=np.uint64)
    assert not split(hashes, np.array([10**6])).heldout(hashes).any()
