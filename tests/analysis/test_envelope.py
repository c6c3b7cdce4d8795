"""The envelope against laws whose exponents are known, and against the paper's own points."""

import math

import numpy as np
import pyarrow as pa
import pytest

from analysis.envelope import Curve, envelope, horizons, training_curves
from analysis.laws import HOFFMANN, PUBLISHED, loss
from analysis.observations import SCHEMA, Observations
from analysis.optimum import FlopsPerToken, exponent, optimum

SIX_N = FlopsPerToken.six_n()
CORRECTED = PUBLISHED["besiroglu-2024"].theta
A = exponent(CORRECTED)


def observed(params, tokens, losses):
    params, tokens = np.asarray(params, dtype=float), np.asarray(tokens, dtype=float)
    nan = np.full(len(params), np.nan)
    return Observations(
        params=params,
        tokens=tokens,
        flops=6 * params * tokens,
        loss=np.asarray(losses, dtype=float),
        loss_stderr=nan,
        budget=nan,
    )


def ladder(*, theta=CORRECTED, sizes=10, ratios=8, noise=0.0, seed=0, low=5e7, high=5e9):
    """Every size at every D/N from 3 to 300."""
    n, r = np.meshgrid(np.geomspace(low, high, sizes), np.geomspace(3, 300, ratios))
    n, d = n.ravel(), (n * r).ravel()
    scatter = np.random.default_rng(seed).standard_normal(len(n))
    return observed(n, d, loss(theta, n, d) * np.exp(noise * scatter))


UNEQUAL = HOFFMANN.theta({"A": 2000.0, "B": 139.0, "E": 1.69, "alpha": 0.45, "beta": 0.25})
"""Optima with D/N from 6 to 70 between 1e8 and 2.5e9 parameters."""


@pytest.mark.parametrize(
    ("theta", "low", "high", "tolerance"),
    [(CORRECTED, 5e7, 5e9, 0.001), (UNEQUAL, 1e8, 2.5e9, 0.002)],
)
def test_a_dense_grid_of_an_exact_law_gives_its_exponent(theta, low, high, tolerance):
    found = envelope(ladder(theta=theta, ratios=60, sizes=12, low=low, high=high))
    assert (found.status, found.reason, found.sizes) == ("ok", None, 12)
    assert found.exponent.estimate == pytest.approx(exponent(theta), abs=tolerance)
    assert found.tokens_exponent.estimate == pytest.approx(1 - found.exponent.estimate, abs=1e-4)
    for flops in (1e20, 5.88e23):
        best = optimum(theta, flops, SIX_N)
        assert found.params_at(flops).estimate == pytest.approx(best.params, rel=0.05)
        assert found.tokens_at(flops).estimate == pytest.approx(best.tokens, rel=0.05)


@pytest.mark.parametrize("ratios", [3, 4, 6])
def test_few_horizons_still_give_it_within_two_hundredths(ratios):
    assert envelope(ladder(ratios=ratios)).exponent.estimate == pytest.approx(A, abs=0.02)


def test_a_crossing_is_where_two_neighbouring_sizes_have_the_same_loss():
    """Two pairs of three sizes; the law says where each pair is even."""
    found = envelope(ladder(sizes=3, ratios=200, low=1e8, high=4e8))
    n = np.array([1e8, 2e8, 4e8])
    assert len(found.crossings) == 2
    for crossing, small, large in zip(found.crossings, n, n[1:], strict=False):
        assert crossing.params == pytest.approx(math.sqrt(small * large), rel=1e-9)
        assert crossing.tokens == pytest.approx(crossing.flops / 6 / crossing.params, rel=1e-6)
        both = loss(
            CORRECTED,
            np.array([small, large]),
            crossing.flops / 6 / np.array([small, large]),
        )
        assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_where_the_best_curve_ends_nothing_crosses():
    """Each size is cut off while it is the best; the next takes over, but no better."""
    sizes, ratio = np.array([1e8, 2e8, 4e8]), np.geomspace(3, 300, 100)
    for last, crossings in ((100, 2), (45, 0)):
        parts = [(n, n * ratio[: last if n < 4e8 else 100]) for n in sizes]
        size = np.concatenate([np.full(len(d), n) for n, d in parts])
        tokens = np.concatenate([d for _, d in parts])
        found = envelope(observed(size, tokens, loss(CORRECTED, size, tokens)))
        assert len(found.crossings) == crossings
        assert found.status == ("ok" if crossings else "no_crossings")
    assert found.exponent is None
    assert found.reason.endswith("and 0 do")


def test_one_horizon_a_size_is_no_curve(sweep):
    truth = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
    found = envelope(sweep(HOFFMANN, truth, budgets=1))
    assert (found.status, found.sizes, found.crossings) == ("no_curves", 0, ())
    assert found.exponent is None
    assert found.params_at(1e20) is None
    assert "two sizes with a curve of two or more horizons, and there are 0" in found.reason


def test_the_mini_grid_has_curves_for_those_widths_that_return(mini_sweep):
    truth = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}
    obs = mini_sweep(HOFFMANN, truth)
    curves = horizons(obs)
    # 12, 80 and 128 are trained at one budget only.
    widths = np.sqrt(np.array([curve.params for curve in curves]) / 24)
    assert widths == pytest.approx([16, 20, 24, 32, 40, 48, 64, 96])
    found = envelope(obs)
    assert found.status == "ok"
    assert 0.3 < found.exponent.estimate < 0.6


def test_replicates_and_digitised_sizes_are_one_size_and_one_horizon():
    params = [1e8, 1.004e8, 1e8, 2e8, 2e8]
    tokens = [1e9, 1e9 / 1.004, 4e9, 1e9, 4e9]
    first, second = horizons(observed(params, tokens, [3.0, 3.2, 2.8, 3.1, 2.7]))
    assert first.loss == pytest.approx([math.sqrt(3.0 * 3.2), 2.8])
    assert len(first.flops) == len(second.flops) == 2
    assert first.params == pytest.approx(1e8, rel=0.002)


def test_intervals_cover_where_sizes_differ_by_more_than_the_noise():
    """Nominally 90%, and meant to be more: the crossings share curves."""
    inside = []
    for seed in range(60):
        part = envelope(ladder(noise=0.001, seed=seed)).exponent
        inside.append(part.low <= A <= part.high)
    assert np.mean(inside) > 0.9 - 3 * math.sqrt(0.09 / 60)
    assert part.high - part.low < 0.2


def test_noise_between_close_sizes_flattens_the_line():
    """What the docstring owns up to: of many sizes the luckiest is the lowest."""
    found = [envelope(ladder(sizes=20, ratios=12, noise=0.006, seed=s)) for s in range(30)]
    mean = np.mean([one.exponent.estimate for one in found])
    assert A - 0.08 < mean < A - 0.02


def test_a_size_without_which_there_is_no_line_leaves_the_ends_open():
    found = envelope(ladder(sizes=3, ratios=50, low=1e8, high=4e8))
    assert found.exponent.estimate == pytest.approx(A, abs=0.01)
    assert (found.exponent.low, found.exponent.high) == (-math.inf, math.inf)
    assert (found.params_at(1e21).low, found.params_at(1e21).high) == (0.0, math.inf)


def test_hoffmanns_digitised_points_give_their_first_approachs_exponent(chinchilla_points):
    """Their Table 2: a = .50 (.488 to .502), b = .50 (.501 to .512), and 67B at 5.76e23."""
    found = envelope(chinchilla_points())
    assert found.status == "ok"
    assert found.exponent.estimate == pytest.approx(0.50, abs=0.03)
    assert found.tokens_exponent.estimate == pytest.approx(0.50, abs=0.03)
    assert found.params_at(5.76e23).estimate == pytest.approx(67e9, rel=0.15)


def test_llama_3s_points_give_the_exponent_that_its_paper_prints(reference_study):
    """Grattafiori et al. 2024: D = 0.299 C^0.537."""
    found = envelope(reference_study("llama3"))
    assert found.tokens_exponent.estimate == pytest.approx(0.537, abs=0.03)


def undecayed(penalty, sizes=10):
    """Training curves of runs to D = 100 N: above the law by `penalty` until the very end."""
    curves = []
    for n in np.geomspace(5e7, 5e9, sizes):
        tokens = np.geomspace(1.0, 100.0, 300) * n
        left = 1.0 - tokens / tokens[-1]
        value = loss(CORRECTED, np.full(300, n), tokens) * (1.0 + penalty * left)
        curves.append(Curve(params=n, tokens=tokens, flops=6 * n * tokens, loss=value))
    return curves


def test_undecayed_curves_are_labelled_biased():
    obs = ladder()
    exact, late = (envelope(obs, curves=undecayed(penalty)) for penalty in (0.0, 0.01))
    for found in (exact, late):
        assert found.status == "biased"
        assert "not decayed" in found.reason
    assert exact.exponent.estimate == pytest.approx(A, abs=0.002)
    # A size far from its own end looks worse than one that has nearly decayed.
    assert late.params_at(1e20).estimate < 0.95 * exact.params_at(1e20).estimate
    assert envelope(obs, curves=[]).status == "no_curves"


def ledger(rows):
    """A table of the ledger's schema, of these columns and nulls."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def point(tokens, flops, train, heldout):
    return {
        "step": tokens // 64,
        "tokens": tokens,
        "flops": flops,
        "train_loss": train,
        "heldout_loss": heldout,
    }


def test_training_curves_come_from_the_ledgers_own_column():
    heldout = [
        point(64, 1e6, 5.0, None),
        point(128, 2e6, 4.0, 4.1),
        point(256, 4e6, 3.0, 3.2),
    ]
    row = {"status": "complete", "params_non_embedding": 100, "params_total": 150}
    table = ledger(
        [
            {**row, "curve": heldout},
            {**row, "status": "diverged", "curve": heldout},
        ]
    )
    (curve,) = training_curves(table)
    assert curve.params == 100
    assert curve.tokens == pytest.approx([128, 256])
    assert curve.flops == pytest.approx([2e6, 4e6])
    assert curve.loss == pytest.approx([4.1, 3.2])
    (total,) = training_curves(table, params="total", flops="6nd")
    assert total.flops == pytest.approx([6 * 150 * 128, 6 * 150 * 256])


def test_training_losses_where_some_curve_has_no_held_out_ones():
    row = {"status": "complete", "params_non_embedding": 100}
    full = [point(64, 1e6, 5.0, 5.1), point(128, 2e6, 4.0, 4.1), point(256, 4e6, math.nan, 3.2)]
    bare = [point(64, 1e6, 5.5, None), point(128, 2e6, 4.5, None)]
    first, second = training_curves(ledger([{**row, "curve": full}, {**row, "curve": bare}]))
    assert first.loss == pytest.approx([5.0, 4.0])
    assert second.loss == pytest.approx([5.5, 4.5])
    assert training_curves(ledger([{**row, "curve": None}])) == ()
