"""What no law can be fitted to is refused by name, with its count."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.fitting import fit
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN_PARAMS, PUBLISHED
from analysis.problem import prepare

TRUTH = {"A": 480.0, "B": 2080.0, "E": 1.82, "alpha": 0.348, "beta": 0.366, "gamma": 0.7}


@pytest.mark.parametrize("weights", [-np.ones(28), np.full(28, np.nan), np.ones(27)])
def test_weights_that_are_none_are_refused(sweep, weights):
    with pytest.raises(InputError, match="weights must be 28 non-negative numbers, one a row"):
        fit(HOFFMANN, replace(sweep(HOFFMANN, TRUTH), weight=weights))


def test_too_few_rows_are_refused_by_name(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    few = obs.select(np.arange(len(obs)) % 6 == 0)
    assert len(few) == 5
    with pytest.raises(
        InputError, match="5 observations cannot determine the 5 constants of the hoffmann law"
    ):
        fit(HOFFMANN, few)
    with pytest.raises(InputError, match="6 constants of the generalised law"):
        fit(GENERALISED, obs.select(np.arange(len(obs)) % 5 == 0))


def test_one_budget_is_refused_by_name(sweep):
    with pytest.raises(InputError, match="one budget only: all 9"):
        fit(HOFFMANN, sweep(HOFFMANN, TRUTH, budgets=1, sizes=9))
    unplanned = sweep(HOFFMANN, TRUTH, budgets=1, sizes=9)
    with pytest.raises(InputError, match="one budget only: all 9"):
        fit(HOFFMANN, replace(unplanned, budget=np.full(9, np.nan)))


def test_a_fixed_tokens_per_parameter_ladder_is_refused_and_a_narrow_one_warned_of(sweep):
    obs = sweep(HOFFMANN, TRUTH, budgets=9, sizes=1, span=1.0)
    with pytest.raises(InputError, match=r"collinear.*20 tokens a parameter"):
        fit(HOFFMANN, obs)
    narrow = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=1e-3, budgets=6, sizes=3, span=1.3))
    assert "nearly collinear" in narrow.warning
    wide = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=1e-3))
    assert wide.warning is None
    # What the warning is about: alpha per unit of noise is known several times less well.
    blur = [np.sqrt(found.covariance[3, 3]) / found.sigma for found in (narrow, wide)]
    assert blur[0] > 3 * blur[1]
    assert narrow.condition > 2 * wide.condition


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
@pytest.mark.parametrize(
    ("column", "letter"), [("params", "N"), ("tokens", "D"), ("flops", "C"), ("loss", "L")]
)
def test_values_that_are_no_positive_numbers_are_refused(sweep, column, letter, bad):
    obs = sweep(HOFFMANN, TRUTH)
    values = getattr(obs, column).copy()
    values[[3, 9]] = bad
    with pytest.raises(
        InputError, match=f"in 2 of 28 observations {letter} is not a positive number"
    ) as caught:
        fit(HOFFMANN, replace(obs, **{column: values}))
    assert f"the first is {bad}" in str(caught.value)


def test_a_loss_that_never_changes_is_refused(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    with pytest.raises(InputError, match=r"all 28 losses are 2\.5: nothing falls with N or D"):
        fit(HOFFMANN, replace(obs, loss=np.full(28, 2.5)))


def test_a_law_of_one_variable_asks_nothing_of_the_other(sweep):
    """Tokens in proportion to parameters: L(N) is as good as ever."""
    ladder = sweep(HOFFMANN, TRUTH, budgets=9, sizes=1, span=1.0)
    assert fit(KAPLAN_PARAMS, ladder).status == "converged"


@pytest.mark.parametrize("pins", [{}, {"A": 400.0}, {"A": 400.0, "B": 2000.0}])
def test_centring_moves_no_loss(sweep, pins):
    """The same theta, at the centre and not, gives the same losses, and its derivative agrees."""
    law = HOFFMANN.pin(pins)
    obs = sweep(HOFFMANN, TRUTH)
    data = prepare(law, obs)
    theta = PUBLISHED["besiroglu-2024"].theta
    centred = np.linalg.solve(data.uncentring, theta)
    assert data.uncentred(centred) == pytest.approx(theta, rel=1e-12)
    terms = np.exp(centred[0] - centred[3] * data.rows.log_n)
    terms = terms + np.exp(centred[1] - centred[4] * data.rows.log_d)
    at = 1.8172 + 482.01 * obs.params**-0.3478 + 2085.43 * obs.tokens**-0.3658
    assert centred[2] + terms == pytest.approx(at, rel=1e-12)
    # A pinned A or B is a number at N = 1 or D = 1, wherever the data are.
    assert (data.centre_n == 0.0, data.centre_d == 0.0) == ("A" in pins, "B" in pins)


def test_rows_may_be_off_together_by_trunk_else_by_budget(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    by_budget = prepare(HOFFMANN, obs).groups
    assert by_budget.tolist() == [k for k in range(4) for _ in range(7)]
    trunk = np.arange(28) // 2 * 10
    by_trunk = prepare(HOFFMANN, replace(obs, trunk=trunk)).groups
    assert by_trunk.tolist() == [k for k in range(14) for _ in range(2)]
    unplanned = replace(obs, budget=np.where(np.arange(28) == 5, np.nan, obs.budget))
    groups = prepare(HOFFMANN, unplanned).groups
    assert np.sum(groups == groups[5]) == 1
    others = np.arange(28) != 5
    regrouped = np.unique(groups[others], return_inverse=True)[1]
    assert regrouped.tolist() == by_budget[others].tolist()
    assert prepare(HOFFMANN, replace(obs, budget=np.full(28, np.nan))).groups is None
