from dataclasses import replace

import numpy as np
import pytest

from analysis.approaches import isoflop
from analysis.intervals import t_quantile
from analysis.laws import HOFFMANN, PUBLISHED, log_loss
from analysis.observations import Observations
from analysis.optimum import FlopsPerToken, optimum

SIX_N = FlopsPerToken.six_n()
CORRECTED = HOFFMANN.theta(PUBLISHED["besiroglu-2024"].constants)


def rows(params, flops, losses, budget=None):
    params, flops = np.asarray(params, dtype=float), np.asarray(flops, dtype=float)
    return Observations(
        params=params,
        tokens=flops / (6 * params),
        flops=flops,
        loss=np.asarray(losses, dtype=float),
        loss_stderr=np.full(len(params), np.nan),
        budget=flops if budget is None else np.asarray(budget, dtype=float),
    )


def bowls(bottoms, flops, *, depth=0.1, floor=3.0, sizes=7, span=16.0):
    """Exact parabolas in ln N with given bottoms, grids centred on 1e8 (C/1e18)^.5."""
    parts = []
    for bottom, c in zip(bottoms, flops, strict=True):
        n = 1e8 * np.sqrt(c / 1e18) * np.exp(np.linspace(-0.5, 0.5, sizes) * np.log(span))
        parts.append((n, np.full(sizes, c), floor + depth * np.log(n / bottom) ** 2))
    return rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def law_sweep(*, noise=0.0, seed=0, span=16.0, off=0.0, budgets=4, sizes=7):
    rng = np.random.default_rng(seed)
    parts = []
    for c in 1e18 * 8.0 ** np.arange(budgets):
        best = optimum(CORRECTED, c, SIX_N).params
        n = best * np.exp(off + np.linspace(-0.5, 0.5, sizes) * np.log(span))
        exact = log_loss(CORRECTED, np.log(n), np.log(c / 6 / n))
        parts.append((n, np.full(sizes, c), np.exp(exact + noise * rng.standard_normal(sizes))))
    return rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def test_exact_parabolas_give_back_their_bottoms_and_the_exponent():
    flops = [1e18, 1e19, 1e20]
    bottoms = [1e8 * (c / 1e18) ** 0.46 for c in flops]
    found = isoflop(bowls(bottoms, flops))
    for vertex, bottom, c in zip(found.vertices, bottoms, flops, strict=True):
        assert vertex.status == "interior"
        assert vertex.reason is None
        assert vertex.params == pytest.approx(bottom, rel=1e-9)
        assert vertex.loss == pytest.approx(3.0, rel=1e-12)
        assert vertex.tokens == pytest.approx(c / (6 * bottom), rel=1e-9)
        assert vertex.params_stderr == pytest.approx(0.0, abs=1e-9)
    assert found.exponent.estimate == pytest.approx(0.46, abs=1e-9)
    assert found.tokens_exponent.estimate == pytest.approx(0.54, abs=1e-9)


def test_tokens_follow_the_cost_that_the_budget_itself_shows():
    obs = bowls([1.1e8], [1e18])
    dear = replace(obs, tokens=obs.tokens / (1.0 + (obs.params / 1e8) ** -0.5))
    (vertex,) = isoflop(dear).vertices
    expected = 1e18 / (6 * 1.1e8 * (1.0 + 1.1**-0.5))
    assert vertex.tokens == pytest.approx(expected, rel=2e-3)


def test_a_vertex_outside_the_grid_is_named_and_left_out_of_the_line():
    flops = [1e18, 1e19, 1e20, 1e21]
    bottoms = [1e8 * (c / 1e18) ** 0.5 for c in flops]
    bottoms[0] /= 100.0
    bottoms[3] *= 100.0
    found = isoflop(bowls(bottoms, flops, depth=0.02))
    assert [v.status for v in found.vertices] == [
        "below_grid",
        "interior",
        "interior",
        "above_grid",
    ]
    assert "below the smallest size, 2.5e+07" in found.vertices[0].reason
    assert "above the largest size" in found.vertices[3].reason
    assert found.vertices[0].params == pytest.approx(1e6, rel=1e-6)
    assert found.vertices[0].loss is None
    assert [v.flops for v in found.interior] == [1e19, 1e20]
    assert found.exponent.estimate == pytest.approx(0.5, abs=1e-9)


def test_a_parabola_that_opens_downwards_has_no_vertex():
    (vertex,) = isoflop(bowls([1e8], [1e18], depth=-0.05)).vertices
    assert vertex.status == "concave"
    assert "curve upwards" in vertex.reason
    assert (vertex.params, vertex.tokens, vertex.loss) == (None, None, None)


def test_replicates_are_not_sizes():
    obs = bowls([1e8], [1e18], sizes=2)
    both = obs.select(np.array([0, 0, 0, 1, 1, 1]))
    (vertex,) = isoflop(both).vertices
    assert (vertex.status, vertex.n, vertex.sizes) == ("too_few_sizes", 6, 2)
    assert "2 distinct sizes" in vertex.reason


def test_three_sizes_determine_a_vertex_but_not_its_error():
    (vertex,) = isoflop(bowls([1.2e8], [1e18], sizes=3)).vertices
    assert vertex.params == pytest.approx(1.2e8, rel=1e-9)
    assert vertex.params_stderr is None


def test_no_line_without_two_interior_vertices_and_no_interval_without_three():
    one = isoflop(bowls([1e8], [1e18]))
    assert one.exponent is None
    assert one.reason == "an exponent needs two budgets, and there are 1"
    lost = isoflop(bowls([1e8, 1e4], [1e18, 1e19], depth=0.01))
    assert lost.exponent is None
    assert "1e+19 FLOPs: the optimum" in lost.reason
    two = isoflop(bowls([1e8, 3e8], [1e18, 1e19]))
    assert two.exponent.estimate == pytest.approx(np.log10(3), abs=1e-9)
    assert (two.exponent.low, two.exponent.high) == (-np.inf, np.inf)


def test_rows_without_a_nominal_budget_are_left_out_and_alone_give_a_reason():
    obs = bowls([1e8], [1e18])
    probe = replace(obs, budget=np.where(np.arange(7) == 0, np.nan, obs.budget))
    assert isoflop(probe).vertices[0].n == 6
    unplanned = isoflop(replace(obs, budget=np.full(7, np.nan)))
    assert (unplanned.vertices, unplanned.exponent, unplanned.faults) == ((), None, ())
    assert unplanned.reason == "an exponent needs two budgets, and there are 0"


@pytest.mark.parametrize(("span", "off"), [(16.0, 0.0), (28.0, 0.0), (28.0, 0.5)])
def test_the_vertex_of_a_lawful_valley_is_nearly_its_optimum(span, off):
    for vertex in isoflop(law_sweep(span=span, off=off)).vertices:
        best = optimum(CORRECTED, vertex.flops, SIX_N)
        assert np.log(vertex.params / best.params) == pytest.approx(0.0, abs=0.02)
        assert np.log(vertex.loss / best.loss) == pytest.approx(0.0, abs=5e-4)


def test_on_a_very_wide_grid_the_vertex_is_nearer_than_a_plain_parabolas():
    obs = law_sweep(span=150.0)
    for vertex in isoflop(obs).vertices:
        best = optimum(CORRECTED, vertex.flops, SIX_N)
        mine = obs.select(obs.budget == vertex.flops)
        plain = np.polynomial.Polynomial.fit(np.log(mine.params), mine.loss, 2)
        (bottom,) = plain.deriv().roots()
        assert abs(np.log(vertex.params / best.params)) < abs(bottom - np.log(best.params))
        assert abs(vertex.loss - best.loss) < 0.7 * abs(plain(bottom) - best.loss)


def test_standard_error_of_the_vertex_is_the_spread_of_repeated_sweeps():
    """Over sweeps of half a percent of noise; also the error that the docstring states."""
    found = [isoflop(law_sweep(noise=0.005, seed=s, span=28.0)).vertices[1] for s in range(300)]
    assert {vertex.status for vertex in found} == {"interior"}
    logs = np.log([vertex.params for vertex in found])
    claimed = np.sqrt(np.mean([vertex.params_stderr**2 for vertex in found]))
    assert claimed == pytest.approx(np.std(logs), rel=0.15)
    best = optimum(CORRECTED, 8e18, SIX_N).params
    assert np.sqrt(np.mean((logs - np.log(best)) ** 2)) < 0.08


def test_the_exponents_interval_covers():
    truth = CORRECTED[4] / (CORRECTED[3] + CORRECTED[4])
    fits = [isoflop(law_sweep(noise=0.003, seed=s)) for s in range(200)]
    inside = np.mean([f.exponent.low <= truth <= f.exponent.high for f in fits])
    assert 0.9 - 0.064 < inside < 0.9 + 0.064  # three Monte-Carlo errors


@pytest.mark.parametrize(
    ("study", "published", "tolerance"),
    [
        ("chinchilla", 0.49, 0.06),  # Hoffmann et al. 2022, Table 2: 0.462 to 0.534
        ("llama3", 0.47, 0.04),  # Grattafiori et al. 2024: D = 0.299 C^0.537, hence a = 0.463
    ],
)
def test_public_studies_give_the_exponent_that_their_papers_print(
    reference_study, study, published, tolerance
):
    found = isoflop(reference_study(study))
    assert {vertex.status for vertex in found.vertices} == {"interior"}
    assert found.exponent.estimate == pytest.approx(published, abs=tolerance)
    assert found.exponent.high - found.exponent.low < 0.1


def test_under_6nd_a_vertex_has_the_compute_of_its_own_n_and_d(mini_sweep):
    """Grids at exact FLOPs, c(N) / 6N from 2.3 to 1.1; optima of the budgets from the law itself.

    The locus of their (N_opt, 6 N_opt D_opt) is what Approach 2 sees of 6ND.
    """
    widths = np.unique(np.geomspace(10, 300, 60).round())
    cost = FlopsPerToken(24 * widths**2, 6 * (24 * widths**2 + 256 * widths) + 780 * widths)
    truth = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}
    budgets = 4e10 * 6.0 ** np.arange(4)
    best = [optimum(HOFFMANN.theta(truth), c, cost) for c in budgets]
    grid = {
        float(c): np.round(np.sqrt(b.params / 24) * np.geomspace(0.5, 2, 9))
        for c, b in zip(budgets, best, strict=True)
    }
    obs = mini_sweep(HOFFMANN, truth, grid=grid)
    ratio = obs.flops / (6 * obs.params * obs.tokens)
    assert (ratio.max(), ratio.min()) == pytest.approx((2.3, 1.12), abs=0.15)

    exact = isoflop(obs)
    by_6nd = replace(obs, flops=6 * obs.params * obs.tokens, flops_convention="6nd")
    found = isoflop(by_6nd)
    for vertex, twin, b in zip(found.vertices, exact.vertices, best, strict=True):
        assert (vertex.budget, vertex.params) == (twin.budget, twin.params)
        assert twin.flops == twin.budget
        mean = np.exp(np.log(obs.flops[obs.budget == twin.budget]).mean())
        assert twin.local_flops == pytest.approx(mean, rel=1e-12)
        # Bias of the parabola in ln N is below 2%, and so it is in ln D and ln C.
        assert np.log(vertex.tokens / b.tokens) == pytest.approx(0.0, abs=0.02)
        assert np.log(vertex.flops / (6 * b.params * b.tokens)) == pytest.approx(0.0, abs=0.01)
        assert vertex.flops == pytest.approx(6 * vertex.params * vertex.tokens, rel=1e-9)
        assert vertex.flops < 0.9 * vertex.budget
    locus = np.polyfit(
        np.log([6 * b.params * b.tokens for b in best]), np.log([b.params for b in best]), 1
    )[0]
    assert found.exponent.estimate == pytest.approx(locus, abs=0.005)
    nominal = np.polyfit(np.log(budgets), np.log([b.params for b in best]), 1)[0]
    assert exact.exponent.estimate == pytest.approx(nominal, abs=0.005)
    assert abs(locus - nominal) > 0.02  # which the test can tell apart


@pytest.mark.parametrize(
    ("losses", "status", "best"),
    [
        ([3.0, 2.5, 2.49], "above_grid", "the largest size, 4e+08, is the best"),
        ([2.49, 2.5, 3.0], "below_grid", "the smallest size, 1e+08, is the best"),
    ],
)
def test_a_minimum_that_no_worse_size_encloses_is_not_interior(losses, status, best):
    """The parabola of these three has its bottom inside the grid all the same."""
    (vertex,) = isoflop(rows([1e8, 2e8, 4e8], [1e18] * 3, losses)).vertices
    assert 1e8 < vertex.params < 4e8
    assert (vertex.status, vertex.loss) == (status, None)
    assert vertex.reason.startswith(best)


def test_the_best_size_is_judged_by_the_mean_of_its_replicates():
    """One lucky replicate of the largest size does not make it the best."""
    params = [1e8, 2e8, 4e8, 4e8]
    (vertex,) = isoflop(rows(params, [1e18] * 4, [3.0, 2.5, 2.45, 2.75])).vertices
    assert vertex.status == "interior"


def test_the_interval_of_a_vertex_covers():
    """By t quantiles of the weighted parabola's effective degrees of freedom."""
    found = [isoflop(law_sweep(noise=0.003, seed=s, sizes=5, span=12)).vertices for s in range(100)]
    inside, tight = [], []
    for vertex in (v for vertices in found for v in vertices if v.status == "interior"):
        best = optimum(CORRECTED, vertex.flops, SIX_N).params
        ends = vertex.params_interval(0.9)
        inside.append(ends.low <= best <= ends.high)
        tight.append(abs(np.log(vertex.params / best)) <= 1.645 * vertex.params_stderr)
        assert 1.0 <= vertex.dof <= 2.0
    assert len(inside) > 350
    assert np.mean(inside) == pytest.approx(0.9, abs=0.05)
    assert np.mean(tight) < 0.82  # what normal quantiles would have covered


def test_the_line_says_the_optimum_at_a_budget_with_its_interval(sweep):
    """NumPy's line and its covariance say the same."""
    obs = sweep(HOFFMANN, PUBLISHED["besiroglu-2024"].constants, noise=0.002)
    found = isoflop(obs, 0.9)
    x = np.log([v.local_flops for v in found.interior])
    y = np.log([v.params for v in found.interior])
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    at = found.params_at(1e22)
    assert at.estimate == pytest.approx(np.exp(slope * np.log(1e22) + intercept), rel=1e-9)
    away = np.array([np.log(1e22), 1.0])
    error = np.sqrt(away @ covariance @ away)
    half = t_quantile(len(x) - 2, 0.9) * error
    assert at.high == pytest.approx(at.estimate * np.exp(half), rel=1e-6)
    assert found.tokens_at(1e22).low < found.tokens_at(1e22).estimate


def test_a_parabola_whose_bottom_is_no_loss_has_no_optimum():
    n = np.geomspace(1e7, 1e9, 5)
    (vertex,) = isoflop(rows(n, np.full(5, 1e18), [1e4, 30.0, 1e-3, 30.0, 1e4])).vertices
    assert (vertex.status, vertex.loss) == ("concave", None)
    assert "no positive loss" in str(vertex.reason)
