"""The combined forecast: whose it is, what its interval holds, and what it says of itself."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.combined import combine
from analysis.discrepancy import DEFAULT, Discrepancy, quantile
from analysis.errors import InputError
from analysis.fitting import Method, fit, fit_each
from analysis.forecast import forecast
from analysis.headline import flops_for, headline
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED
from analysis.optimum import FlopsPerToken, optimum
from analysis.pair import Basis, Pair, fit_basis, fit_pair, gamma_test

SIX_N = FlopsPerToken.six_n()
NOISE_ONLY = Discrepancy(params=0.0, loss=0.0, source="back-tests", back_tests=9)
HOFFMANN_TRUTH = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}
BENT_TRUTH = {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
KAPLANS = PUBLISHED["kaplan-2020"].constants


def test_where_gamma_is_plainly_not_one_it_is_the_generalised_laws_forecast(mini_sweep, mini_cost):
    obs = mini_sweep(GENERALISED, {**BENT_TRUTH, "gamma": 0.3}, noise=1e-4)
    head = headline(obs, 1e13, mini_cost)
    alone = forecast(fit(GENERALISED, obs), 1e13, mini_cost)
    assert min(head.params_weight, head.loss_weight) > 0.995
    assert (head.params_law, head.loss_law) == ("generalised", "generalised")
    for name in ("params", "tokens", "loss", "new_run", "exponent"):
        mine, its = getattr(head, name), getattr(alone, name)
        assert mine.estimate == pytest.approx(its.estimate, rel=2e-4), name
        assert (mine.low, mine.high) == pytest.approx((its.low, its.high), rel=2e-4), name


def test_in_between_it_is_the_weighted_mean_of_both_in_logarithms(mini_sweep, mini_cost):
    """The interval is the generalised law's, which allows for more, and reaches to the estimate."""
    seen = []
    for seed in range(6):
        obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.005, seed=seed)
        head = headline(obs, 1e14, mini_cost, discrepancy=NOISE_ONLY)
        narrow, wide = (forecast(fit(law, obs), 1e14, mini_cost) for law in (HOFFMANN, GENERALISED))
        if not fit(GENERALISED, obs).sound:
            continue
        weight = head.loss_weight
        seen.append(weight)
        for name in ("params", "loss"):
            mine, one, two = (getattr(item, name) for item in (head, narrow, wide))
            mean = (1 - weight) * math.log(one.estimate) + weight * math.log(two.estimate)
            assert math.log(mine.estimate) == pytest.approx(mean, abs=1e-9), name
            assert mine.low == pytest.approx(min(two.low, mine.estimate), rel=1e-9), name
            assert mine.high == pytest.approx(max(two.high, mine.estimate), rel=1e-9), name
        slopes = narrow.exponent.estimate, wide.exponent.estimate
        assert head.exponent.estimate == pytest.approx(np.dot((1 - weight, weight), slopes))
        assert head.loss_law == f"{weight:.0%} generalised, {1 - weight:.0%} hoffmann"
        assert [item.law for item in head.forecasts] == ["hoffmann", "generalised"]
    assert len(seen) >= 3
    assert min(seen) < 0.3 < 0.5 < max(seen)


def test_an_interval_reaches_to_its_estimate_at_any_level(mini_sweep, mini_cost):
    """Narrow ones of the generalised law alone would leave the mean of both laws out."""
    outside = 0
    for seed in range(4):
        obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.005, seed=seed)
        head = headline(obs, 1e14, mini_cost, level=0.05)
        own = forecast(fit(GENERALISED, obs), 1e14, mini_cost, level=0.05)
        for name in ("params", "loss", "new_run", "exponent"):
            mine, its = getattr(head, name), getattr(own, name)
            assert mine.low <= mine.estimate <= mine.high
            outside += not its.low <= mine.estimate <= its.high
    assert outside > 0


def test_a_generalised_law_that_cannot_be_fitted_leaves_hoffmanns_forecast(mini_sweep, mini_cost):
    obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.002)
    six = obs.select(np.isin(np.arange(28), [0, 3, 6, 21, 24, 27]))
    head = headline(six, 3e12, mini_cost, discrepancy=NOISE_ONLY)
    alone = forecast(fit(HOFFMANN, six), 3e12, mini_cost)
    assert (head.params_law, head.loss_law) == ("hoffmann", "hoffmann")
    assert (head.params, head.loss, head.new_run) == (alone.params, alone.loss, alone.new_run)
    assert len(head.forecasts) == 1
    assert any("6 constants of the generalised law" in note for note in head.notes)


def test_tokens_are_what_the_budget_leaves_for_that_size(mini_sweep, mini_cost):
    """D = C / c(N): the ends change places."""
    head = headline(mini_sweep(GENERALISED, BENT_TRUTH, noise=0.002, seed=2), 1e13, mini_cost)
    assert head.tokens.low == pytest.approx(1e13 / mini_cost(head.params.high))
    assert head.tokens.estimate == pytest.approx(1e13 / mini_cost(head.params.estimate))
    assert head.tokens.high == pytest.approx(1e13 / mini_cost(head.params.low))


def test_intervals_widen_with_reach(sweep):
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.005, seed=4)
    widths = []
    for reach in (1.0, 10.0, 100.0, 1000.0):
        head = headline(obs, reach * obs.flops.max(), SIX_N)
        ends = (head.params, head.loss, head.new_run)
        widths.append([math.log(part.high / part.low) for part in ends])
    assert np.all(np.diff(widths, axis=0) > 0)
    assert np.all(np.array(widths)[:, 2] > np.array(widths)[:, 1])


@pytest.mark.parametrize(
    ("law", "truth"),
    [
        (HOFFMANN, PUBLISHED["besiroglu-2024"].constants),
        (GENERALISED, {"A": 3e3, "B": 2e4, "E": 1.6, "alpha": 0.5, "beta": 0.52, "gamma": 0.6}),
        (KAPLAN, KAPLANS),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.003])
def test_headline_intervals_hold_whichever_law_is_true(sweep, law, truth, shift):
    """Nominally 90%, at 100x; 85 to 96% asked for, here less three Monte-Carlo errors."""
    repetitions = 120
    obs = sweep(law, truth, budgets=5, step=3.0)
    target = 100 * obs.flops.max()
    best = optimum(law.theta(truth), target, SIX_N)
    rng = np.random.default_rng(0)
    noise = 0.003 * rng.standard_normal((repetitions, 35))
    noise += shift * np.repeat(rng.standard_normal((repetitions, 5)), 7, axis=1)
    fits = [fit_each(item, obs, obs.loss * np.exp(noise)) for item in (HOFFMANN, GENERALISED)]
    inside = np.zeros(2)
    for one, two in zip(*fits, strict=True):
        pair = Pair(hoffmann=one, generalised=two, test=gamma_test(one, two), note=None)
        found = combine(Basis(recent=pair, all=pair), target, SIX_N, 0.9)
        inside += [
            found.params.low <= best.params <= found.params.high,
            found.loss.low <= best.loss <= found.loss.high,
        ]
    error = 3 * math.sqrt(0.09 / repetitions)
    assert np.all(inside / repetitions > 0.85 - error), inside
    assert np.all(inside / repetitions < min(0.96 + error, 1.0)), inside


def test_where_e_is_not_identified_the_headline_says_so_and_still_has_ends(mini_sweep, mini_cost):
    truth = {**HOFFMANN_TRUTH, "E": 0.0}
    heads = [
        headline(mini_sweep(HOFFMANN, truth, noise=0.006, seed=s), 3e12, mini_cost)
        for s in range(6)
    ]
    noted = [head for head in heads if any("E is not identified" in note for note in head.notes)]
    assert noted
    for head in heads:
        assert 0 < head.loss.low < head.loss.estimate < head.loss.high < 2 * head.loss.low
        assert head.params.high / head.params.low < 3


def test_a_headline_without_a_sound_fit_has_open_ends_and_says_so(sweep):
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.003)
    pair = fit_pair(obs)
    lost = replace(
        pair,
        hoffmann=replace(pair.hoffmann, status="not_converged"),
        generalised=replace(pair.generalised, status="at_bound"),
    )
    head = headline(obs, 1e21, SIX_N, basis=Basis(recent=lost, all=lost))
    assert not head.all.hoffmann.sound
    assert not head.all.generalised.sound
    assert (head.params_weight, head.loss_weight) == (0.0, 0.0)
    for part in (head.params, head.tokens, head.loss, head.new_run):
        assert (part.low, part.high) == (0.0, math.inf)
    for law in ("hoffmann", "generalised"):
        assert any(n.startswith(f"{law} law: its forecast has no interval") for n in head.notes)


def test_a_headline_says_where_no_optimum_was_seen(mini_sweep, mini_cost):
    obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.001)
    seen = "no budget's optimum was seen inside its grid: the forecast extrapolates in N"
    assert seen not in headline(obs, 3e12, mini_cost).notes
    slope = 24 * np.array([30.0, 39.0, 50.0, 70.0]) ** 2
    least = dict(zip(np.unique(obs.budget), slope, strict=True))
    above = obs.select(obs.params > np.array([least[b] for b in obs.budget]))
    notes = headline(above, 3e12, mini_cost).notes
    assert seen in notes
    assert any(n.startswith("1.08e+12 FLOPs: ") and "below" in n for n in notes)


def test_a_headline_says_how_far_it_reaches(mini_sweep, mini_cost):
    obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.001)
    near = headline(obs, 1.08e14, mini_cost)
    assert near.over_top_budget == pytest.approx(100.0)
    assert not any("budget," in n for n in near.notes)
    far = headline(obs, 1.08e18, mini_cost)
    assert "C is 1e+06 times the largest budget, 1.08e+12 FLOPs: " in far.notes[-1]
    below = headline(obs, 1e10, mini_cost)
    assert below.notes[-1] == "C is below the smallest budget, 4e+10 FLOPs"


def test_a_headline_says_which_budgets_its_size_is_from(sweep):
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.002, budgets=6)
    head = headline(obs, 1e23, SIX_N)
    assert head.notes[0] == "N_opt from the last 4 budgets, 28 of 42 observations"
    near = forecast(fit(HOFFMANN, obs.select(np.arange(42) >= 14)), 1e23, SIX_N)
    far = forecast(fit(HOFFMANN, obs), 1e23, SIX_N)
    assert head.forecasts[0].params == near.params
    assert head.forecasts[0].loss == far.loss


def test_less_than_one_parameter_is_no_answer(mini_sweep, mini_cost):
    obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.001)
    with pytest.raises(
        InputError, match=r"at 1 FLOPs N_opt would be 0\.\d+ parameters, less than one"
    ):
        headline(obs, 1.0, mini_cost)


@pytest.mark.parametrize("objective", ["squares", "huber"])
def test_a_method_is_that_of_all_its_fits(sweep, objective):
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.002, budgets=6)
    method = Method(objective=objective, delta=0.002, pinned={"E": 0.25})
    head = headline(obs, 1e23, SIX_N, method=method)
    for pair in (head.recent, head.all):
        for item in pair.fits:
            assert item.method == method
            assert item.constants["E"] == 0.25


@pytest.mark.parametrize(("law", "truth"), [(HOFFMANN, HOFFMANN_TRUTH), (GENERALISED, BENT_TRUTH)])
def test_the_budget_of_a_size_or_of_tokens_is_where_the_headline_has_them(
    mini_sweep, mini_cost, law, truth
):
    obs = mini_sweep(law, truth, noise=0.003, seed=1)
    basis = fit_basis(obs)
    by_params = flops_for(basis, mini_cost, obs, params=1e7)
    assert headline(obs, by_params, mini_cost).params.estimate == pytest.approx(1e7, rel=1e-6)
    by_tokens = flops_for(basis, mini_cost, obs, tokens=1e9)
    assert headline(obs, by_tokens, mini_cost).tokens.estimate == pytest.approx(1e9, rel=0.02)
    for wrong in ({"params": 0.0}, {"tokens": math.inf}):
        with pytest.raises(InputError, match="positive number of"):
            flops_for(basis, mini_cost, obs, **wrong)
    with pytest.raises(InputError, match="is the unit right"):
        flops_for(basis, mini_cost, obs, params=1e60)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_are_noise_and_law_in_quadrature(mini_sweep, mini_cost, level):
    """Half-widths of ln N and ln L; N_opt's discrepancy is that of D_opt, the other way round."""
    obs = mini_sweep(GENERALISED, BENT_TRUTH, noise=0.002, seed=2)
    known = Discrepancy(params=0.08, loss=0.003, source="back-tests", back_tests=3)
    flops = 9.0 * 1.08e12
    alone, head = (
        headline(obs, flops, mini_cost, level, discrepancy=item) for item in (NOISE_ONLY, known)
    )
    assert head.by_law == pytest.approx((0.08 * math.log(9.0), 0.003 * math.log(9.0)))
    assert head.noise == alone.noise
    assert alone.by_law == (0.0, 0.0)
    z = quantile(level)
    for name, by_law in zip(
        ("params", "loss", "new_run"), (*head.by_law, head.by_law[1]), strict=True
    ):
        narrow, wide = getattr(alone, name), getattr(head, name)
        assert wide.estimate == narrow.estimate
        for one, two in ((narrow.low, wide.low), (narrow.high, wide.high)):
            own = math.log(one / narrow.estimate)
            expected = math.hypot(own, z * by_law)
            assert abs(math.log(two / wide.estimate)) == pytest.approx(expected, rel=1e-9)
    half = 0.5 * math.log(alone.params.high / alone.params.low)
    assert head.noise.params == pytest.approx(half / z)
    assert head.tokens.high == pytest.approx(flops / mini_cost(head.params.low))
    assert head.exponent == alone.exponent
    assert head.forecasts[0].params == alone.forecasts[0].params


def test_inside_the_measured_budgets_nothing_is_added(mini_sweep, mini_cost):
    obs = mini_sweep(GENERALISED, BENT_TRUTH, noise=0.002, seed=2)
    far_off = Discrepancy(params=9.0, loss=9.0, source="back-tests", back_tests=3)
    inside = [headline(obs, 1.08e12, mini_cost, discrepancy=item) for item in (NOISE_ONLY, far_off)]
    assert inside[0].params == inside[1].params
    assert inside[0].loss == inside[1].loss


@pytest.mark.parametrize("budgets", [True, False])
def test_below_the_smallest_budget_a_law_extrapolates_as_well(sweep, budgets):
    """The discrepancy grows with the distance from the smallest budget, or the smallest C."""
    obs = sweep(GENERALISED, BENT_TRUTH, noise=0.002, seed=2, centre=300.0)
    if not budgets:
        obs = replace(obs, budget=np.full(len(obs), np.nan))
    known = Discrepancy(params=0.08, loss=0.003, source="back-tests", back_tests=3)
    bottom = float(obs.flops.min())
    heads = [headline(obs, share * bottom, SIX_N, discrepancy=known) for share in (1.0, 0.1, 0.01)]
    expected = [(0.08 * math.log(k), 0.003 * math.log(k)) for k in (1.0, 10.0, 100.0)]
    assert [item.by_law for item in heads] == [pytest.approx(pair) for pair in expected]
    alone = headline(obs, 0.01 * bottom, SIX_N, discrepancy=NOISE_ONLY)
    own = math.log(alone.params.high / alone.params.estimate)
    wide = math.log(heads[2].params.high / heads[2].params.estimate)
    assert wide == pytest.approx(math.hypot(own, quantile(0.9) * expected[2][0]))


@pytest.mark.parametrize(
    ("budgets", "noise", "source", "number", "note"),
    [
        (2, 0.002, "default", 0, "no back-test tells how far the law is off"),
        (3, 0.005, "default", 1, "1 back-test is too noisy to tell how far the law is off"),
        (4, 0.012, "default", 2, "2 back-tests are too noisy to tell how far the law is off"),
        (3, 0.0005, "back-tests", 1, None),
        (4, 0.001, "back-tests", 2, None),
    ],
)
def test_a_headline_says_what_its_discrepancy_rests_on(sweep, budgets, noise, source, number, note):
    """Two budgets have no back-test; one or two tell only where noise lets them."""
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=noise, budgets=budgets, centre=300.0, span=30.0)
    head = headline(obs, 1e21, SIX_N)
    assert (head.discrepancy.source, head.discrepancy.back_tests) == (source, number)
    said = [n for n in head.notes if "how far the law is off" in n]
    assert [n.split(":")[0] for n in said] == ([note] if note else [])
    if note:
        assert "the 11% that N_opt was off beyond noise in public studies for each" in said[0]
        assert head.by_law.params == pytest.approx(0.11 * math.log(1e21 / obs.flops.max()))


def test_without_budgets_the_default_is_taken(sweep):
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.002, centre=300.0)
    none = replace(obs, budget=np.full(len(obs), np.nan))
    head = headline(none, 1e21, SIX_N)
    assert head.discrepancy == DEFAULT
    assert head.by_law.params == pytest.approx(0.11 * math.log(1e21 / obs.flops.max()))


@pytest.mark.parametrize("budgets", [True, False])
@pytest.mark.parametrize(
    ("centre", "said"),
    [(2e5, "below the smallest"), (1.0, "above the largest"), (300.0, None)],
)
def test_an_optimum_outside_the_measured_ratios_is_named(sweep, budgets, centre, said):
    """Grids a factor of hundreds off: the optimum is where none of the runs was."""
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.0005, centre=centre, span=4.0)
    if not budgets:
        obs = replace(obs, budget=np.full(len(obs), np.nan))
    head = headline(obs, 4e20, SIX_N)
    notes = [n for n in head.notes if "D/N" in n]
    assert notes == ([head.ratio_note] if said else [])
    if said is None:
        return
    ratio, measured = head.tokens.estimate / head.params.estimate, obs.tokens / obs.params
    far = measured.min() / ratio if said.startswith("below") else ratio / measured.max()
    assert far > 2.0
    assert f"is {far:.2g} times {said} D/N that was measured" in notes[0]
    assert notes[0].startswith("the forecast extrapolates in D/N: the D/N of the optimum, ")
