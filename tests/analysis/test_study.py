"""The study as a whole: JSON without infinities, refusals by name, figures and page."""

import dataclasses
import json

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.figures import draw, save
from analysis.laws import HOFFMANN, PUBLISHED, FlopsPerToken, loss
from analysis.observations import Observations
from analysis.study import forecast_json, next_budget, require_laws, study, to_json


def _sweep(budgets: list[float], noise: float = 0.002) -> Observations:
    """Seven sizes over 16x around 20 tokens a parameter, from the corrected Chinchilla law."""
    rows = []
    for c in budgets:
        centre = np.sqrt(c / 120)
        rows += [(n, c / (6 * n), c) for n in centre * np.geomspace(0.25, 4, 7)]
    n, d, c = np.array(rows).T
    truth = HOFFMANN.theta(PUBLISHED["besiroglu-2024"].constants)
    noisy = loss(HOFFMANN, truth, n, d) * np.exp(
        noise * np.random.default_rng(0).normal(size=len(n))
    )
    unknown = np.full(len(n), np.nan)
    return Observations(params=n, tokens=d, flops=c, loss=noisy, loss_stderr=unknown, budget=c)


BUDGETS = [1e18, 3e18, 1e19, 3e19]


def test_a_study_is_strict_json_and_names_its_convention() -> None:
    found = study(_sweep(BUDGETS), cost=FlopsPerToken.six_n(), excluded={"diverged": 2})
    text = json.dumps(to_json(found), allow_nan=False)
    again = json.loads(text)
    assert again["excluded"] == [{"reason": "diverged", "count": 2}]
    assert again["exponents"]["hoffmann"]["a"] == pytest.approx(0.5126, abs=0.03)
    assert again["exponents"]["hoffmann"]["params"] == "non_embedding"
    assert [v["status"] for v in again["vertices"]] == ["interior"] * 4
    assert again["forecast"]["flops"] == pytest.approx(9e19, rel=0.01)


def test_intervals_hold_their_estimates_and_the_truth() -> None:
    found = study(_sweep(BUDGETS), cost=FlopsPerToken.six_n(), next_flops=1e20, level=0.99)
    ahead = forecast_json(found.next)
    for name in ("params", "tokens", "loss", "exponent", "tokens_per_param"):
        low, high = ahead[f"{name}_interval"]
        assert low < ahead[name] < high
    assert ahead["params"] * ahead["tokens"] * 6 == pytest.approx(1e20, rel=1e-6)
    truth = 1.8172 + 482.01 * ahead["params"] ** -0.3478 + 2085.43 * ahead["tokens"] ** -0.3658
    low, high = ahead["loss_interval"]
    assert low < truth < high


def test_two_budgets_leave_open_ends_null() -> None:
    found = to_json(study(_sweep(BUDGETS[:2]), cost=FlopsPerToken.six_n()))
    assert found["exponents"]["isoflop"]["a_interval"] == [None, None]


def test_one_budget_has_a_valley_but_no_law() -> None:
    found = study(_sweep(BUDGETS[:1]), cost=FlopsPerToken.six_n())
    assert found.isoflop.vertices[0].status == "interior"
    assert (found.fits, found.next, found.heldout) == ((), None, None)
    with pytest.raises(InputError, match="one budget only"):
        require_laws(found)
    assert to_json(found)["exponents"]["hoffmann"] is None


def test_the_next_budget_keeps_the_step_within_bounds() -> None:
    assert next_budget(_sweep([1e18, 3e18])) == pytest.approx(9e18)
    assert next_budget(_sweep([1e18, 1.1e18])) == pytest.approx(2.2e18)
    assert next_budget(_sweep([1e18, 1e20])) == pytest.approx(1e21)


@pytest.mark.parametrize("budgets", [BUDGETS, BUDGETS[:1]])
def test_figures_are_drawn_whatever_is_missing(tmp_path, budgets: list[float]) -> None:
    obs = _sweep(budgets)
    off_centre = obs.select((obs.budget != budgets[0]) | (obs.params > np.sqrt(budgets[0] / 200)))
    figures = draw(study(off_centre, cost=FlopsPerToken.six_n()))
    pictures = save(figures, tmp_path)
    assert [p.name for p in pictures] == ["isoflop.png", "scaling.png"][: len(figures)]
    assert len(figures) == (2 if len(budgets) > 1 else 1)
    drawn = figures["isoflop"].axes[0].lines
    points = sum(len(line.get_xdata()) for line in drawn if line.get_marker() == "o")
    assert points == len(off_centre)


def test_the_convention_of_a_study_is_that_of_its_observations() -> None:
    obs = dataclasses.replace(_sweep(BUDGETS), params_convention="total", flops_convention="6nd")
    found = to_json(study(obs, cost=FlopsPerToken.six_n()))
    assert found["convention"] == {"params": "total", "flops": "6nd"}
