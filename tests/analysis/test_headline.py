"""The combined forecast: whose it is, what its interval holds, and what it says of itself."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.combined import combine
from analysis.discrepancy import Discrepancy
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
