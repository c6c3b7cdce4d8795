"""Optima of rate and batch from probes, and the power laws through them, on known truths."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.intervals import Interval
from analysis.tuning import Optimum, bowl, power_law

BLOCK = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=float)
"""Octaves of rate and batch."""


def _form(rate: float, batch: float) -> Callable[..., np.ndarray]:
    """Losses of a tilted valley with its minimum there."""

    def loss(r: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = np.log(r / rate), np.log(b / batch)
        return 2.0 + 0.03 * x**2 + 0.015 * y**2 + 0.01 * x * y

    return loss


def test_the_minimum_of_a_quadratic_form_is_found_exactly() -> None:
    rate, batch = 0.01 * 2 ** BLOCK[:, 0], 512 * 2 ** BLOCK[:, 1]
    found = bowl(rate, batch, _form(0.013, 400.0)(rate, batch))
    assert found.rate.value.estimate == pytest.approx(0.013, rel=1e-6)
    assert found.batch.value.estimate == pytest.approx(400.0, rel=1e-6)
    assert (found.rate.place, found.batch.place) == ("interior", "interior")
    assert found.loss == pytest.approx(2.0)
    assert (found.n, found.fixed_batch) == (9, False)


def test_nominal_90_percent_intervals_hold_the_optimum() -> None:
    """Nine probes with noise of a tenth of the valley's depth at an octave."""
    rng, held = np.random.default_rng(0), []
    rate, batch = 2 ** BLOCK[:, 0], 2 ** BLOCK[:, 1]
    for _ in range(100):
        best = np.exp(rng.uniform(-0.35, 0.35, 2))
        noise = 0.002 * rng.standard_normal(9)
        found = bowl(rate, batch, _form(*best)(rate, batch) + noise)
        for optimum, truth in zip((found.rate, found.batch), best, strict=True):
            held.append(optimum.value.low <= truth <= optimum.value.high)
    assert 0.85 <= np.mean(held) <= 0.97


@pytest.mark.parametrize(("best", "place", "end"), [(8.0, "above", 2.0), (0.1, "below", 0.5)])
def test_an_optimum_beyond_the_probes_is_at_their_edge(best: float, place: str, end: float) -> None:
    rate, batch = 2 ** BLOCK[:, 0], 2 ** BLOCK[:, 1]
    found = bowl(rate, batch, _form(best, 1.0)(rate, batch))
    assert found.rate.place == place
    assert found.rate.value.estimate == pytest.approx(end)


def test_the_best_rate_at_the_usual_batch_is_found_on_its_line() -> None:
    """Along batch 512 of the form, d/dx = 0.06 x + 0.01 ln(512 / 400)."""
    rate, batch = 0.01 * 2 ** BLOCK[:, 0], 512 * 2 ** BLOCK[:, 1]
    found = bowl(rate, batch, _form(0.013, 400.0)(rate, batch), usual_batch=512.0)
    there = 0.013 * (512 / 400) ** (-1 / 6)
    assert found.rate_at_usual.value.estimate == pytest.approx(there, rel=1e-6)
    assert found.rate.value.estimate == pytest.approx(0.013, rel=1e-6)
    assert found.at_usual.rate == found.rate_at_usual


@pytest.mark.parametrize("best", [2**0.8, 2**-0.8])
def test_an_optimum_near_the_edge_is_no_better_known_for_that(best: float) -> None:
    """Where half of the draws end at the edge, the other half tells its error."""
    rate, batch = 2 ** BLOCK[:, 0], 2 ** BLOCK[:, 1]
    noise = 0.004 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1])
    middle, near = (bowl(rate, batch, _form(b, 1.0)(rate, batch) + noise) for b in (1.0, best))
    assert near.rate.place == middle.rate.place == "interior"
    assert near.rate.log_stderr > 0.8 * middle.rate.log_stderr


def test_where_no_other_batch_can_be_trained_the_rate_is_found_alone() -> None:
    rate, batch = 0.01 * 2.0 ** np.arange(-2, 3), np.full(5, 64.0)
    found = bowl(rate, batch, _form(0.012, 64.0)(rate, batch))
    assert found.fixed_batch
    assert found.rate.value.estimate == pytest.approx(0.012)


def test_too_few_probes_are_refused() -> None:
    with pytest.raises(InputError, match="2 learning rates do not tell where the best one is"):
        bowl(np.array([1.0, 2.0]), np.ones(2), np.ones(2))
    with pytest.raises(InputError, match="5 probes do not tell the 5 constants"):
        bowl(np.array([1.0, 2.0, 4.0, 1.0, 2.0]), np.array([1.0, 1, 1, 2, 2]), np.ones(5))


def _optima(values: np.ndarray, stderr: float = 0.05) -> list[Optimum]:
    return [
        Optimum(value=Interval(v, v, v, 0.9), log_stderr=stderr, place="interior") for v in values
    ]


def test_step_laws_exponents_are_recovered_from_its_own_optima() -> None:
    """Li et al. 2025: rate 1.79 N^-0.713 D^0.307."""
    n, d = np.repeat([1e6, 4e6, 2e7], 2), np.array([1e7, 4e7, 5e7, 3e8, 1e9, 2e8])
    found = power_law(_optima(1.79 * n**-0.713 * d**0.307), {"N": n, "D": d}, dof=10)
    assert found.exponents["N"].estimate == pytest.approx(-0.713)
    assert found.exponents["D"].estimate == pytest.approx(0.307)
    assert found.at(N=1.0, D=1.0) == pytest.approx(1.79)
    assert found.scatter == pytest.approx(0.0, abs=1e-9)


def test_a_coefficient_may_be_over_a_reference() -> None:
    """Porian et al. 2024: rate 0.0047 (N / 108e6)^(-1/3)."""
    n = np.array([1e6, 4e6])
    found = power_law(_optima(0.0047 * (n / 108e6) ** (-1 / 3)), {"N": n}, dof=6)
    assert found.coefficient(N=108e6) == pytest.approx(0.0047)


def test_where_d_goes_with_n_only_one_exponent_is_told() -> None:
    n = np.array([1e6, 4e6, 2e7])
    optima = _optima(1.79 * n**-0.713 * (20 * n) ** 0.307)
    with pytest.raises(InputError, match="3 probed models do not tell the exponents of N and D"):
        power_law(optima, {"N": n, "D": 20 * n}, dof=9)
    found = power_law(optima, {"N": n, "D": 20 * n}, dof=9, given={"D": 0.307})
    assert found.exponents["N"].estimate == pytest.approx(-0.713)
    assert found.at(N=1.0, D=1.0) == pytest.approx(1.79)


def test_no_law_goes_through_a_bound() -> None:
    """The smallest model's rates end a factor 4 below its best one, which would turn the law."""
    n = np.array([1e4, 1e5, 1e6, 1e7])
    best = 0.02 * (n / 1e5) ** -0.33
    rates = [c * 2 ** BLOCK[:, 0] for c in (best[0] / 8, *best[1:])]
    batch = 512 * 2 ** BLOCK[:, 1]
    optima = [
        bowl(rate, batch, _form(b, 512.0)(rate, batch)).rate
        for b, rate in zip(best, rates, strict=True)
    ]
    assert [optimum.place for optimum in optima] == ["above", *["interior"] * 3]
    found = power_law(optima, {"N": n}, dof=10)
    assert found.exponents["N"].estimate == pytest.approx(-0.33)
    assert found.centre["N"] == pytest.approx(1e6)
    with pytest.raises(InputError, match="1 of 2 models have their best value within what was pro"):
        power_law(optima[:2], {"N": n[:2]}, dof=10)
    lower = [replace(optimum, place="below") for optimum in optima]
    with pytest.raises(InputError, match="at least: probe lower ones"):
        power_law(lower, {"N": n}, dof=10)


def test_an_exponent_is_as_uncertain_as_its_optima() -> None:
    """Two optima, known to 5%, a factor e^2 apart: the slope's error is sqrt(2) 5% / 2."""
    n = np.exp(np.array([10.0, 12.0]))
    found = power_law(_optima(n**-0.5), {"N": n}, dof=1e6).exponents["N"]
    assert found.high - found.estimate == pytest.approx(1.645 * 2**0.5 * 0.05 / 2, rel=1e-3)
