"""Cells of equal N and D: equal but for padding and rounding, and never wider than that."""

import numpy as np

from analysis.cells import TOLERANCE, cells


def test_padding_and_rounding_do_not_part_a_cell() -> None:
    n = np.array([124_439_808, 124_475_904, 124_337_664, 353_772_544], dtype=float)  # padded GPT-2
    d = np.array([2.5e9, 2.5e9, 2.501e9, 2.5e9])
    assert cells(n, d).tolist() == [0, 0, 0, 1]


def test_rows_of_other_sizes_or_tokens_are_other_cells() -> None:
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 7), np.geomspace(1e9, 1e11, 5))
    label = cells(n.ravel(), d.ravel())
    assert len(np.unique(label)) == 35
    assert sorted(np.unique(label)) == list(range(35))


def test_no_cell_of_scattered_rows_is_wider_than_the_tolerance() -> None:
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(17, 19, 20_000)), np.exp(rng.uniform(20, 20.5, 20_000))
    label = cells(n, d)
    for values in (n, d):
        low, high = np.full(label.max() + 1, np.inf), np.zeros(label.max() + 1)
        np.minimum.at(low, label, values)
        np.maximum.at(high, label, values)
        assert np.log(high / low).max() <= TOLERANCE * (1 + 1e-6)


def test_the_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    n = np.repeat(np.geomspace(1e7, 1e9, 6), 4) * rng.uniform(1, 1.004, 24)
    d = np.tile(np.geomspace(1e9, 1e11, 4), 6)
    order = rng.permutation(24)
    one, other = cells(n, d)[order], cells(n[order], d[order])
    assert np.array_equal(one[:, None] == one, other[:, None] == other)
