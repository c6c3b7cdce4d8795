"""Points of training curves are told from grids of finished runs."""

import numpy as np
import pyarrow as pa
import pytest

from analysis.curve_points import Curves, find_curves
from analysis.errors import InputError
from analysis.laws import PUBLISHED, loss

THETA = PUBLISHED["besiroglu-2024"].theta
SIZES, RATIOS, SHARES = (2e7, 5e7, 1.2e8, 3e8), (8, 25, 80), (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def _curves(undecayed: float = 0.05, noise: float = 0.001) -> dict[str, np.ndarray]:
    """Runs of each size at three horizons, six points each, the last one decayed."""
    rows = [
        (f"{n:.0f}-{ratio}", n, n * ratio * share, share == 1.0)
        for n in SIZES
        for ratio in RATIOS
        for share in SHARES
    ]
    run, n, d, last = (np.array(part) for part in zip(*rows, strict=True))
    scatter = noise * np.random.default_rng(0).standard_normal(len(n))
    above = np.where(last, 0.0, undecayed)
    return {
        "run": run, "step": np.round(d / 1e5).astype(int), "params": n, "tokens": d,
        "loss": loss(THETA, n, d) * np.exp(above + scatter),
    }  # fmt: skip


def _found(
    columns: dict[str, np.ndarray], *names: str, order: np.ndarray | None = None, **options: str
) -> Curves | None:
    if order is not None:
        columns = {key: values[order] for key, values in columns.items()}
    trio = ("params", "tokens", "loss")
    table = pa.table({name: columns[name] for name in (*trio, *names)})
    return find_curves(table, *(columns[name] for name in trio), set(trio), **options)


@pytest.mark.parametrize("names", [("run",), ("run", "step"), ("step",), ()], ids=str)
def test_the_last_point_of_each_run_is_found_by_a_column_or_by_order(names) -> None:
    columns = _curves()
    found = _found(columns, *names)
    assert found is not None
    assert found.runs == 12
    ends = columns["tokens"][found.last] / columns["params"][found.last]
    assert ends.tolist() == pytest.approx(list(RATIOS) * 4)
    assert ("run" in names) == ("'run'" in found.by)


def test_a_column_of_runs_is_enough_in_any_order() -> None:
    columns = _curves()
    order = np.random.default_rng(1).permutation(len(columns["loss"]))
    found = _found(columns, "run", order=order)
    assert found is not None
    assert found.last.sum() == 12
    ends = (columns["tokens"] / columns["params"])[order][found.last]
    assert sorted(ends) == pytest.approx(sorted(list(RATIOS) * 4))


def test_a_run_whose_tokens_are_planned_ends_at_its_last_step() -> None:
    columns = _curves()
    planned = {**columns, "tokens": np.repeat(columns["tokens"][5::6], 6)}
    found = _found(planned, "run", "step")
    assert found is not None
    np.testing.assert_array_equal(np.flatnonzero(found.last) % 6, 5)


def test_a_grid_of_finished_runs_is_no_curve() -> None:
    n = np.repeat(np.geomspace(1e7, 1e9, 6), 7)
    d = np.tile(np.geomspace(1e9, 1e11, 7), 6)
    scatter = np.exp(0.002 * np.random.default_rng(0).standard_normal(42))
    grid = {"params": n, "tokens": d, "loss": loss(THETA, n, d) * scatter}
    assert _found(grid) is None
    label = np.array([f"{size / 1e6:.0f}M" for size in n])
    assert _found({**grid, "model": label}, "model") is None
    each = np.array([f"r{i}" for i in range(42)])
    steps = np.round(d / 5e5).astype(int)
    assert _found({**grid, "run_id": each, "step": steps}, "run_id", "step") is None


def test_finished_runs_of_one_size_in_order_are_no_curve_though_their_steps_rise() -> None:
    n = np.repeat(np.geomspace(5e7, 1.6e9, 7), 5)
    d = n * np.tile([5, 10, 20, 40, 80], 7)
    scatter = np.exp(0.002 * np.random.default_rng(0).standard_normal(35))
    grid = {
        "params": n, "tokens": d, "loss": loss(THETA, n, d) * scatter,
        "step": np.round(d / 5e5).astype(int),
        "model": np.array([f"{size:.0f}" for size in n]),
        "slug": np.array([f"{size:.0f}-{tokens:.0f}" for size, tokens in zip(n, d, strict=True)]),
    }  # fmt: skip
    for names in (("step",), ("step", "model"), ("step", "slug")):
        assert _found(grid, *names) is None


def test_the_newest_points_may_come_first() -> None:
    columns = _curves()
    order = np.arange(len(columns["loss"]))[::-1]
    for names in ((), ("step",)):
        found = _found(columns, *names, order=order)
        assert found is not None
        assert found.runs == 12


def test_replicates_of_a_grid_in_blocks_are_no_curves() -> None:
    n = np.tile(np.repeat(np.geomspace(1e7, 1e9, 5), 6), 2)
    d = np.tile(np.geomspace(1e9, 1e11, 6), 10)
    scatter = np.exp(0.002 * np.random.default_rng(0).standard_normal(60))
    grid = {
        "params": n,
        "tokens": d,
        "loss": loss(THETA, n, d) * scatter,
        "seed": np.repeat([0, 1], 30),
    }
    assert _found(grid, "seed") is None


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_make_curves(seed: int) -> None:
    """Noise makes the loss fall faster at the end for half of the rows of one size."""
    n = np.repeat(np.geomspace(1e7, 1e9, 6), 6)
    d = np.tile(np.geomspace(1e9, 1e11, 6), 6)
    scatter = np.exp(0.04 * np.random.default_rng(seed).standard_normal(36))
    assert _found({"params": n, "tokens": d, "loss": loss(THETA, n, d) * scatter}) is None


def test_published_grids_are_no_curves(farseer_csv) -> None:
    import pyarrow.csv as csv

    table = csv.read_csv(farseer_csv)
    trio = [table[name].to_numpy().astype(float) for name in ("params", "tokens", "loss")]
    assert find_curves(table, *trio, {"params", "tokens", "loss"}) is None


def test_rows_of_one_run_without_progress_share_its_noise_and_all_stay() -> None:
    n, d = np.repeat(SIZES, 3), np.repeat([1e9] * 4, 3)
    rows = {
        "params": n,
        "tokens": d,
        "loss": loss(THETA, n, d),
        "run": np.repeat(["a", "b", "c", "d"], 3),
    }
    found = _found(rows, "run")
    assert found is not None
    assert found.last.all()
    assert found.runs == 4


def test_a_column_that_somebody_names_tells_runs_apart_if_it_can() -> None:
    columns = _curves()
    found = _found({**columns, "mine": columns["run"]}, "mine", run="mine")
    assert found is not None
    assert (found.runs, int(found.last.sum())) == (12, 12)
    several = np.repeat(["x", "y"], 36)
    with pytest.raises(InputError, match="different N, so that 'mine' does not name runs"):
        _found({**columns, "mine": several}, "mine", run="mine")
