"""The contract of `--json`: which keys there are, what is null, and that nothing is infinite."""

import dataclasses
import json
import math

import numpy as np
import pytest

from analysis.fitting import Method
from analysis.intervals import Interval
from analysis.laws import GENERALISED, HOFFMANN, PUBLISHED, loss
from analysis.optimum import FlopsPerToken, optimum
from analysis.study import study
from analysis.study_json import ends, forecast_json, to_json

SIX_N = FlopsPerToken.six_n()
TRUTH = PUBLISHED["besiroglu-2024"].constants
BUDGETS = [1e18, 3e18, 1e19, 3e19]
OF_A_LAW = {
    *("parameters", "intervals", "level", "a", "b", "objective", "rmse_log", "status"),
    *("a_interval", "b_interval", "reason", "condition"),
}


def said(obs, **how):
    """The study as somebody reads it who parses strict JSON."""
    found = to_json(study(obs, cost=SIX_N, **how))
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture(scope="module")
def usual(sweep):
    return said(sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS), excluded={"diverged": 2})


def test_a_study_has_the_keys_that_were_promised(usual):
    assert usual["observations"] == 28
    assert usual["excluded"] == [{"reason": "diverged", "count": 2}]
    assert usual["convention"] == {"params": "non_embedding", "flops": "exact"}
    assert set(usual["laws"]) == {"hoffmann", "generalised", "kaplan"}
    assert set(usual["approaches"]) == {"envelope", "isoflop", "parametric"}
    assert {"top_budgets", "laws"} <= set(usual["heldout"])
    assert set(usual["gamma_test"]) == {"statistic", "p"}
    assert all(isinstance(warning, str) for warning in usual["warnings"])


def test_every_law_says_what_it_found_and_how_well_it_is_known(usual):
    names = {
        "hoffmann": ["A", "B", "E", "alpha", "beta"],
        "generalised": ["A", "B", "E", "alpha", "beta", "gamma"],
        "kaplan": ["A", "B", "alpha", "gamma"],
    }
    for law, said_of in usual["laws"].items():
        assert set(said_of) == OF_A_LAW
        assert list(said_of["intervals"]) == names[law]  # of what was estimated
        assert set(said_of["parameters"]) >= set(names[law])
        assert said_of["level"] == 0.9
        assert said_of["a"] + said_of["b"] == pytest.approx(1.0)  # under 6ND
        for name, (low, high) in said_of["intervals"].items():
            assert low < said_of["parameters"][name] < high
    hoffmann = usual["laws"]["hoffmann"]
    for name, (low, high) in hoffmann["intervals"].items():
        assert low < TRUTH[name] < high, name
    assert hoffmann["a"] == pytest.approx(0.3658 / (0.3478 + 0.3658), abs=0.02)


def test_the_objective_and_the_residuals_are_those_of_the_constants_printed(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS)
    law = said(obs)["laws"]["hoffmann"]
    theta = HOFFMANN.theta(law["parameters"])
    residual = np.log(obs.loss / loss(theta, obs.params, obs.tokens))
    assert law["objective"] == pytest.approx(residual @ residual / 2, rel=1e-6)
    assert law["rmse_log"] == pytest.approx(math.sqrt(np.mean(residual**2)), rel=1e-6)


def test_approaches_have_their_exponents_and_reasons(usual):
    envelope, isoflop, parametric = (
        usual["approaches"][name] for name in ("envelope", "isoflop", "parametric")
    )
    assert (envelope["status"], envelope["a"], envelope["a_interval"]) == (
        "no_curves",
        None,
        [None, None],
    )
    assert envelope["reason"]
    assert isoflop["status"] == "ok"
    assert isoflop["a_interval"][0] < isoflop["a"] < isoflop["a_interval"][1]
    for vertex, budget in zip(isoflop["vertices"], BUDGETS, strict=True):
        assert {"flops", "params", "tokens", "loss", "status"} <= set(vertex)
        assert (vertex["flops"], vertex["status"]) == (budget, "interior")
        assert 6 * vertex["params"] * vertex["tokens"] == pytest.approx(budget, rel=1e-6)
    assert (parametric["status"], parametric["a"]) == ("converged", usual["laws"]["hoffmann"]["a"])


def test_held_out_errors_are_small_where_the_law_is_true(usual):
    assert usual["heldout"]["top_budgets"] == [3e19]
    assert usual["leave_one_out"]["top_budgets"] == BUDGETS
    for part in ("heldout", "leave_one_out"):
        errors = usual[part]["laws"]
        assert set(errors) == {"hoffmann", "generalised", "kaplan", "headline"}
        assert abs(errors["headline"]["loss_error"]) < 0.01
        assert abs(errors["headline"]["params_error"]) < 0.3


def test_intervals_hold_their_estimates_and_the_truth(sweep):
    found = study(
        sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS), cost=SIX_N, next_flops=1e20, level=0.99
    )
    ahead = forecast_json(found.next, SIX_N)
    for name in ("params", "tokens", "loss", "exponent", "tokens_per_param"):
        low, high = ahead[f"{name}_interval"]
        assert low < ahead[name] < high
    assert ahead["level"] == 0.99
    assert ahead["params"] * ahead["tokens"] * 6 == pytest.approx(1e20, rel=1e-6)
    assert ahead["tokens_per_param"] == pytest.approx(ahead["tokens"] / ahead["params"])
    truth = 1.8172 + 482.01 * ahead["params"] ** -0.3478 + 2085.43 * ahead["tokens"] ** -0.3658
    low, high = ahead["loss_interval"]
    assert low < truth < high
    assert ahead["new_run_interval"][0] < low < high < ahead["new_run_interval"][1]
    assert set(ahead["laws"]) == {"hoffmann", "generalised"}
    for law in ahead["laws"].values():
        assert law["params"] * law["tokens"] * 6 == pytest.approx(1e20, rel=1e-6)


def test_within_a_share_of_the_best_loss_it_is_so_by_the_leading_law(sweep):
    """At the ends the loss is .1% and 1% above the one at N_opt, by the printed formula."""
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS, seed=1)
    found = study(obs, cost=SIX_N, next_flops=1e20, method=Method(pinned={"E": 1.8172}))
    assert found.next.params_weight < 0.5
    ahead = forecast_json(found.next, SIX_N)
    theta = found.next.recent.hoffmann.theta
    scale = ahead["laws"]["hoffmann"]["params"] / ahead["params"]

    def at(params):
        return loss(theta, params * scale, 1e20 / (6 * params * scale))

    for name, share in (("0.1%", 0.001), ("1%", 0.01)):
        low, high = ahead["within"][name]
        assert low < ahead["params"] < high
        assert at(low) / at(ahead["params"]) == pytest.approx(1 + share, rel=1e-6)
        assert at(high) / at(ahead["params"]) == pytest.approx(1 + share, rel=1e-6)


def test_two_budgets_leave_open_ends_null(sweep):
    found = said(sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS[:2]))
    assert found["exponents"]["isoflop"]["a_interval"] == [None, None]
    assert found["approaches"]["isoflop"]["a_interval"] == [None, None]
    assert found["leave_one_out"]["top_budgets"] == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.0, [1.0, 2.0]),
        (0.0, math.inf, [None, None]),
        (-math.inf, 3.0, [None, 3.0]),
        (-1.0, 1.0, [-1.0, 1.0]),
    ],
)
def test_ends_that_the_data_did_not_set_are_null(low, high, expected):
    assert ends(Interval(1.0, low, high, 0.9)) == expected


@pytest.mark.parametrize("kept", [5, 7])
def test_laws_that_are_refused_have_a_reason_and_nothing_else(sweep, kept):
    """Of one budget's seven rows, and of five rows, which would do for Kaplan's law alone."""
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS)
    obs = obs.select(np.arange(28) < 7 if kept == 7 else np.isin(np.arange(28), [0, 3, 9, 20, 27]))
    found = said(obs)
    for law in ("hoffmann", "generalised", "kaplan"):
        assert found["laws"][law]["status"] == "refused"
        assert found["laws"][law]["reason"], law
    assert found["approaches"]["parametric"]["status"] == "refused"
    assert found["approaches"]["parametric"]["reason"] == found["laws"]["hoffmann"]["reason"]
    assert (found["gamma_test"], found["forecast"]) == (None, None)


def test_the_generalised_law_alone_is_refused_where_it_lacks_a_row(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS)
    found = said(obs.select(np.isin(np.arange(28), [0, 3, 6, 21, 24, 27])))
    assert found["laws"]["hoffmann"]["status"] == "converged"
    assert found["laws"]["generalised"]["status"] == "refused"
    assert "6 observations" in found["laws"]["generalised"]["reason"]
    assert found["gamma_test"] is None
    assert "generalised" not in found["forecast"]["laws"]


def test_observations_without_budgets_have_laws_and_no_valleys(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS)
    found = said(dataclasses.replace(obs, budget=np.full(28, np.nan)))
    assert found["laws"]["hoffmann"]["status"] == "converged"
    assert found["approaches"]["isoflop"]["status"] == "refused"
    assert found["approaches"]["isoflop"]["vertices"] == []
    assert found["budgets"] == []
    for part in ("heldout", "leave_one_out"):
        assert (found[part]["top_budgets"], found[part]["budgets"]) == ([], [])
        assert found[part]["laws"]["hoffmann"] == {"loss_error": None, "params_error": None}
    assert found["forecast"]["params"] > 0


def test_the_convention_of_a_study_is_that_of_its_observations(sweep):
    obs = dataclasses.replace(
        sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS),
        params_convention="total",
        flops_convention="6nd",
    )
    found = said(obs)
    assert found["convention"] == {"params": "total", "flops": "6nd"}
    assert found["exponents"]["hoffmann"]["params"] == "total"


def test_an_exponent_says_whether_its_law_could_be_fitted(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    rising = dataclasses.replace(obs, loss=1.0 + 0.02 * np.log(obs.params / obs.params.min()))
    exponent = said(rising)["exponents"]["hoffmann"]
    assert (exponent["status"], exponent["a_interval"]) == ("at_bound", [None, None])
    sound = said(sweep(HOFFMANN, TRUTH, noise=0.002))
    assert sound["exponents"]["generalised"]["status"] == "converged"


def test_exact_data_are_strict_json_too(sweep):
    """F is infinite, or rounding; intervals have no width."""
    found = said(sweep(HOFFMANN, TRUTH, at=BUDGETS))
    assert found["laws"]["hoffmann"]["parameters"]["E"] == pytest.approx(1.8172, rel=1e-6)
    assert found["forecast"]["flops"] == pytest.approx(9e19, rel=0.01)


def test_back_tests_and_discrepancy_have_the_keys_that_were_promised(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, budgets=5)
    made = study(obs, cost=SIX_N)
    found = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert [item["budget"] for item in found["back_tests"]] == found["heldout"]["top_budgets"]
    for item in found["back_tests"]:
        for part in ("params", "loss"):
            low, high = item[f"{part}_interval"]
            assert item["held"][part] is (low <= item[f"{part}_measured"] <= high)
        assert item["discrepancy"]["source"] == "back-tests"
        assert item["noise"]["params"] > 0.0
    for told in (found["discrepancy"], found["forecast"]["discrepancy"]):
        assert (told["source"], told["back_tests"]) == ("back-tests", 3)
        reach = math.log(found["forecast"]["over_top_budget"])
        for part in ("params", "loss"):
            assert told[part] == pytest.approx(told["per_log_flops"][part] * reach)
    assert found["discrepancy"]["flops"] == found["forecast"]["flops"]
    assert set(found["forecast"]["noise"]) == {"params", "loss"}


def test_one_budget_has_no_back_test_and_the_default(sweep):
    found = said(sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS[:1]))
    assert found["back_tests"] == []
    assert found["discrepancy"]["source"] == "default"
    assert found["discrepancy"]["params"] == pytest.approx(0.11 * math.log(2.0))
    assert found["vertices"][0]["params_by_law"] is None


@pytest.mark.parametrize(("alpha", "beta", "side"), [(0.6, 0.35, 1.0), (0.35, 0.6, -1.0)])
def test_vertices_stand_beside_the_laws_optimum(sweep, alpha, beta, side):
    """A parabola reads exact valleys of gamma = .5 high where alpha is the larger, else low."""
    bent = {"A": 1.6e5, "B": 1.6e5, "E": 1.7, "alpha": alpha, "beta": beta, "gamma": 0.5}
    theta = GENERALISED.theta(bent)
    middle = optimum(theta, 5e18, SIX_N)
    obs = sweep(GENERALISED, bent, at=BUDGETS, span=30.0, centre=middle.tokens / middle.params)
    found = said(obs)
    for part in (found, found["approaches"]["isoflop"]):
        for vertex in part["vertices"]:
            exact = optimum(theta, vertex["flops"], SIX_N).params
            assert vertex["params_by_law"] == pytest.approx(exact, rel=1e-4)
            assert 0.02 < side * math.log(vertex["params"] / exact) < 0.2
