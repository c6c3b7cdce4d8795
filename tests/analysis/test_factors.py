"""Columns by which rows of equal N and D differ: found where they do, and not where they do not."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from analysis.cells import cells
from analysis.factors import FAR, Factors, find_factors
from analysis.laws import PUBLISHED, loss

THETA = PUBLISHED["besiroglu-2024"].theta


def _sweep(times: int = 1, budgets: int = 4, sizes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    flops = np.repeat(1e18 * 3.0 ** np.arange(budgets), sizes)
    n = np.sqrt(flops / 120) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    return np.repeat(n, times), np.repeat(flops / (6 * n), times)


def _found(
    effect: np.ndarray, n: np.ndarray, d: np.ndarray, seed: int = 0, **columns: object
) -> Factors:
    noise = 0.002 * np.random.default_rng(seed).standard_normal(len(n))
    losses = loss(THETA, n, d) * np.exp(effect + noise)
    table = pa.table({name: np.asarray(values) for name, values in columns.items()})
    return find_factors(table, cells(n, d), n, d, losses, frozenset())


def _kinds(n: int) -> Iterator[np.ndarray]:
    yield np.array(["dense", "moe"])[np.arange(n) % 2]
    yield np.arange(n) % 2 == 0
    yield np.arange(n) % 2
    yield (np.arange(n) % 2) * 1.5


@pytest.mark.parametrize("kind", range(4), ids=["words", "flags", "integers", "numbers"])
def test_a_second_kind_in_every_cell_is_found_whatever_its_type(kind: int) -> None:
    n, d = _sweep(2)
    column = list(_kinds(len(n)))[kind]
    effect = np.where(np.arange(len(n)) % 2 == 1, 0.06, 0.0)
    (factor,) = _found(effect, n, d, arch=column).deciding
    assert (factor.column, factor.cells) == ("arch", 28)
    assert factor.share > 0.98
    assert factor.effect == pytest.approx(0.03, rel=0.05)  # half of the rows are 6% worse


def test_the_share_of_two_hyperparameters_is_what_each_does() -> None:
    n, d = _sweep(12)
    rate = np.tile(np.repeat([1e-3, 2e-3, 4e-3, 8e-3], 3), 28)
    batch = np.tile([64, 128, 256], 28 * 4)
    by_rate, by_batch = 0.02 * np.log(rate / 2e-3) ** 2, 0.008 * np.abs(np.log(batch / 128))
    found = _found(by_rate + by_batch, n, d, lr=rate, batch_size=batch)
    lr, bs = found.deciding
    assert (lr.column, bs.column) == ("lr", "batch_size")
    assert lr.tuned
    assert bs.tuned
    # Effects are additive and crossed, so that variances within a cell add up.
    variances = by_rate[:12].var(), by_batch[:12].var()
    whole = sum(variances) + 0.002**2 * 11 / 12
    assert lr.share == pytest.approx(variances[0] / whole, rel=0.03)
    assert bs.share == pytest.approx(variances[1] / whole, rel=0.15)


def test_rates_drawn_at_random_are_found_although_their_best_moves_with_size() -> None:
    n, d = _sweep(5)
    rng = np.random.default_rng(3)
    rate = np.exp(rng.uniform(np.log(5e-4), np.log(1e-2), len(n)))
    best = 2e-3 * (n / 1e8) ** -0.3
    (factor,) = _found(0.03 * np.log(rate / best) ** 2, n, d, learning_rate=rate).deciding
    assert factor.column == "learning_rate"
    assert factor.share > 0.8


def test_a_kind_that_no_cell_shares_is_found_about_the_surface() -> None:
    n, d = _sweep()
    arch = np.random.default_rng(5).choice(["a", "b"], len(n))
    found = _found(np.where(arch == "b", 0.05, 0.0), n, d, arch=arch)
    assert (found.within, found.cells) == ((), 0)
    (factor,) = found.deciding
    assert (factor.column, factor.cells) == ("arch", 0)


def test_small_differences_are_told_but_decide_nothing() -> None:
    n, d = _sweep(6)
    word = np.tile(["a", "a", "a", "b", "b", "b"], 28)
    found = _found(np.where(word == "b", 0.004, 0.0), n, d, data=word)
    assert found.deciding == ()
    (factor,) = found.within
    assert factor.column == "data"
    assert factor.effect < FAR


def test_a_column_that_only_orders_sizes_is_left_untold() -> None:
    n, d = _sweep()
    label = np.where(n < np.median(n), "small", "large")
    rule = 3e-3 * (n / 1e8) ** -0.3
    found = _found(np.zeros(len(n)), n, d, family=label, lr=rule)
    assert found.factors == ()
    assert set(found.untold) == {"family", "lr"}


def test_what_was_measured_or_names_a_run_explains_nothing() -> None:
    n, d = _sweep(3)
    rng = np.random.default_rng(0)
    effect = 0.02 * rng.standard_normal(len(n))  # runs differ by what nobody wrote down
    losses = loss(THETA, n, d) * np.exp(effect)
    columns = {
        "train_loss": losses * 1.01,
        "accuracy": 1 / losses,
        "id": np.arange(len(n)),
        "seed": np.tile([0, 1, 2], 28),
        "name": [f"run-{i}" for i in range(len(n))],
    }
    found = find_factors(pa.table(columns), cells(n, d), n, d, losses, frozenset())
    assert found.factors == ()
    assert found.spread == pytest.approx(0.02, rel=0.2)


def test_columns_without_effect_are_named_in_one_table_of_a_thousand() -> None:
    n, d = _sweep(2, budgets=3, sizes=5)
    named = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        columns = {f"c{i}": rng.choice(["a", "b", "c"], len(n)) for i in range(5)}
        named += bool(_found(np.zeros(len(n)), n, d, seed, **columns).factors)
    # Expected are two: a thousandth by each of the two tests. Nine has a probability of .0002.
    assert named < 9


def test_a_blank_beside_a_value_in_a_cell_is_a_level_that_nothing_suggests() -> None:
    """Exports leave what has its default blank."""
    n, d = _sweep(2)
    other = np.where(np.arange(len(n)) % 2 == 0, "muon", " ")
    effect = np.where(np.arange(len(n)) % 2 == 0, 0.05, 0.0)
    (factor,) = _found(effect, n, d, optim=other).deciding
    assert factor.suggested == "muon"
    # Between cells a blank says nothing.
    n, d = _sweep()
    note = np.where(np.random.default_rng(0).random(len(n)) < 0.3, "8 GPUs", "")
    assert _found(np.zeros(len(n)), n, d, notes=note).factors == ()


def test_what_a_kind_does_may_change_with_size() -> None:
    n, d = _sweep(2)
    moe = np.arange(len(n)) % 2 == 1
    effect = np.where(moe, 0.04 * np.log(n / np.exp(np.log(n).mean())), 0.0)
    (factor,) = _found(effect, n, d, moe=moe).deciding
    assert factor.column == "moe"


def test_rates_drawn_at_random_are_found_where_no_rows_share_a_cell() -> None:
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(2e7), np.log(1e9), 80))
    d = n * np.exp(rng.uniform(np.log(5), np.log(80), 80))
    rate = np.exp(rng.uniform(np.log(5e-4), np.log(1e-2), 80))
    (factor,) = _found(0.03 * np.log(rate / 2e-3) ** 2, n, d, lr=rate).deciding
    assert (factor.column, factor.cells, factor.suggested) == ("lr", 0, None)


@pytest.mark.parametrize("name", ["repeats", "loss_fn", "memory_layers", "seed_data", "max"])
def test_names_that_only_look_like_measurements_are_factors(name: str) -> None:
    n, d = _sweep(2)
    effect = np.where(np.arange(len(n)) % 2 == 1, 0.05, 0.0)
    (factor,) = _found(effect, n, d, **{name: np.arange(len(n)) % 2 + 1}).deciding
    assert factor.column == name


def test_blank_rows_do_not_hide_the_levels_of_others() -> None:
    n, d = _sweep(3)
    arch = np.tile(["a", "b", ""], 28)
    effect = np.tile([0.0, 0.05, 0.02], 28)
    (factor,) = _found(effect, n, d, arch=arch).deciding
    assert factor.suggested == "a"  # as many rows have it as b, and it is better


def test_millions_of_rows_are_looked_at_by_whole_cells() -> None:
    n, d = _sweep(4000)
    word = np.tile(["a", "b"], len(n) // 2)
    found = _found(np.where(word == "b", 0.05, 0.0), n, d, arch=word)
    assert found.cells == 28
    assert found.deciding[0].column == "arch"
