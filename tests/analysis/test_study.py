"""The study as a whole: what is refused by name, what is warned of, and its figures."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.figures import draw, save
from analysis.intervals import t_quantile
from analysis.laws import GENERALISED, HOFFMANN, PUBLISHED
from analysis.observations import Observations
from analysis.optimum import FlopsPerToken
from analysis.study import next_budget, require_laws, study
from analysis.study_json import to_json

Sweep = Callable[..., Observations]
TRUTH = PUBLISHED["besiroglu-2024"].constants
MINI = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}
BUDGETS = [1e18, 3e18, 1e19, 3e19]


def test_one_budget_has_a_valley_but_no_law(sweep: Sweep) -> None:
    found = study(sweep(HOFFMANN, TRUTH, noise=0.002, at=BUDGETS[:1]), cost=FlopsPerToken.six_n())
    assert found.isoflop.vertices[0].status == "interior"
    assert (found.fits, found.next, found.heldout, found.left_out) == ((), None, (), ())
    with pytest.raises(InputError, match="one budget only"):
        require_laws(found)
    assert set(found.refusals) >= {"hoffmann", "kaplan"}


def test_the_next_budget_keeps_the_step_within_bounds(sweep: Sweep) -> None:
    assert next_budget(sweep(HOFFMANN, TRUTH, noise=0.002, at=[1e18, 3e18])) == pytest.approx(9e18)
    assert next_budget(sweep(HOFFMANN, TRUTH, noise=0.002, at=[1e18, 1.1e18])) == pytest.approx(
        2.2e18
    )
    assert next_budget(sweep(HOFFMANN, TRUTH, noise=0.002, at=[1e18, 1e20])) == pytest.approx(1e21)


@pytest.mark.parametrize("budgets", [BUDGETS, BUDGETS[:1]])
def test_figures_are_drawn_whatever_is_missing(
    sweep: Sweep, tmp_path, budgets: list[float]
) -> None:
    obs = sweep(HOFFMANN, TRUTH, noise=0.002, at=budgets)
    off_centre = obs.select((obs.budget != budgets[0]) | (obs.params > np.sqrt(budgets[0] / 200)))
    figures = draw(study(off_centre, cost=FlopsPerToken.six_n()))
    pictures = save(figures, tmp_path)
    assert [p.name for p in pictures] == ["isoflop.png", "scaling.png"][: len(figures)]
    assert len(figures) == (2 if len(budgets) > 1 else 1)
    drawn = figures["isoflop"].axes[0].lines
    points = sum(len(line.get_xdata()) for line in drawn if line.get_marker() == "o")
    assert points == len(off_centre)


def test_under_6nd_the_study_speaks_of_6nd_throughout(mini_sweep: Sweep) -> None:
    exact = mini_sweep(HOFFMANN, MINI, noise=0.001)
    obs = dataclasses.replace(exact, flops=6 * exact.params * exact.tokens, flops_convention="6nd")
    found = study(obs, cost=FlopsPerToken.six_n())
    top = found.isoflop.vertices[-1]
    assert top.budget == 1.08e12
    assert found.top_flops == top.flops == pytest.approx(6 * top.params * top.tokens)
    assert found.top_flops < 0.9 * top.budget
    assert next_budget(obs) == pytest.approx(3 * found.top_flops)
    said = to_json(found)
    assert said["exponents"]["hoffmann"]["at_flops"] == found.top_flops
    assert said["forecast"]["over_top_budget"] == pytest.approx(3.0)
    assert [v["budget"] for v in said["vertices"]] == said["budgets"]
    assert [v["flops"] for v in said["vertices"]] == [v.flops for v in found.isoflop.vertices]
    legend = draw(found)["isoflop"].axes[0].get_legend()
    assert legend.get_texts()[-1].get_text() == f"{top.flops:.3g}"
    lines = draw(found)["isoflop"].axes[0].lines
    drawn = [line for line in lines if len(line.get_xdata()) == 120]
    measured = exact.loss[exact.budget == 1.08e12]
    assert np.ptp(np.log([drawn[-1].get_ydata()[0], measured[0]])) < 0.01  # on its own points
    assert study(exact, cost=FlopsPerToken.from_observations(exact)).top_flops == 1.08e12


def test_no_forecast_at_the_next_budget_is_a_warning_and_at_a_given_one_an_error(
    sweep: Sweep,
) -> None:
    obs = sweep(HOFFMANN, TRUTH, noise=0.002)
    with pytest.raises(InputError, match="less than one"):
        study(obs, cost=FlopsPerToken.six_n(), next_flops=10.0)
    # N counted in units of 1e12 parameters: every optimum is below one.
    tiny = dataclasses.replace(obs, params=obs.params / 1e12)
    found = study(tiny, cost=FlopsPerToken(np.array([1.0]), np.array([6e12])))
    assert found.next is None
    assert any("less than one" in warning for warning in found.warnings)
    assert to_json(found)["forecast"] is None
    assert set(draw(found)) == {"isoflop", "scaling"}


def test_error_bars_are_t_intervals_of_the_studys_level(sweep: Sweep) -> None:
    found = study(sweep(HOFFMANN, TRUTH, noise=0.002), cost=FlopsPerToken.six_n(), level=0.8)
    axes = draw(found)["scaling"].axes[0]
    (bars,) = [c for c in axes.containers if c.get_label() == "IsoFLOP minima, 80%"]
    segments = bars[2][0].get_segments()
    for vertex, segment in zip(found.isoflop.interior, segments, strict=True):
        half = np.log(segment[1][1] / segment[0][1]) / 2
        assert half == pytest.approx(vertex.params_stderr * t_quantile(vertex.dof, 0.8), rel=1e-6)
        assert 3.0 < vertex.dof <= 4.0  # seven sizes, three constants


def test_the_forecast_lies_between_the_lines_drawn_as_its_weight_has_it(sweep: Sweep) -> None:
    obs = sweep(HOFFMANN, TRUTH, noise=0.01, budgets=6, seed=1)
    found = study(obs, cost=FlopsPerToken.six_n())
    assert found.next is not None
    lines = {line.get_label(): line for line in draw(found)["scaling"].axes[0].lines}
    there = [
        np.interp(np.log(found.next.flops), *np.log(lines[name].get_data()))
        for name in ("hoffmann law, last 4 budgets", "generalised law, last 4 budgets")
    ]
    weight = found.next.params_weight
    assert 0.0 < weight < 1.0
    assert abs(there[1] - there[0]) > 1e-3
    between = (1.0 - weight) * there[0] + weight * there[1]
    assert between == pytest.approx(np.log(found.next.params.estimate), abs=1e-6)


BENT = {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.4}


@pytest.mark.parametrize(
    ("replicates", "against"), [(1, "around the parabolas"), (2, "of replicates")]
)
def test_a_law_that_does_not_fit_is_named_and_one_that_does_is_not(
    sweep: Sweep, replicates: int, against: str
) -> None:
    design = {"base": 1e12, "step": 30.0, "span": 16.0, "replicates": replicates}
    wrong = study(
        sweep(GENERALISED, BENT, noise=2e-4, seed=2, **design), cost=FlopsPerToken.six_n()
    ).warnings
    misfit = [warning for warning in wrong if "lack of fit" in warning]
    assert [w.split()[0] for w in misfit] == ["hoffmann"]
    assert against in misfit[0]
    assert misfit[0].endswith("%): these observations do not follow one such law")
    if replicates > 1:  # parabolas leave their own bias besides the noise
        assert "scatter of replicates (0.02%)" in misfit[0]
    for seed in range(12):
        obs = sweep(HOFFMANN, MINI, noise=3e-3, seed=seed, **design)
        right = study(obs, cost=FlopsPerToken.six_n()).warnings
        assert not any("lack of fit" in warning for warning in right)
