"""Each kind of interval is the one that its own module makes."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.bootstrap import bootstrap
from analysis.errors import InputError
from analysis.fitting import Method, fit
from analysis.forecast import forecast
from analysis.intervals import constant_intervals
from analysis.laws import HOFFMANN, PUBLISHED
from analysis.optimum import FlopsPerToken
from analysis.profile import profile
from analysis.uncertainty import law_intervals

SIX_N = FlopsPerToken.six_n()
TRUTH = PUBLISHED["besiroglu-2024"].constants


@pytest.fixture(scope="module")
def fitted(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003, budgets=6)
    found = fit(HOFFMANN, obs)
    return found, obs, forecast(found, 1e21, SIX_N, 0.8)


def test_t_intervals_are_those_of_the_constants_and_of_the_forecast(fitted):
    found, obs, said = fitted
    known = law_intervals(found, obs, said, SIX_N)
    assert known.constants == constant_intervals(found, 0.8)
    assert (known.exponent, known.tokens_exponent) == (said.exponent, said.tokens_exponent)


def test_profiles_of_a_logarithm_are_read_in_the_constants_own_unit(fitted):
    found, obs, said = fitted
    known = law_intervals(found, obs, said, SIX_N, "profile")
    for i, name in ((0, "A"), (2, "E")):
        own = profile(found, obs, lambda theta, i=i: (float(theta[i]), np.eye(6)[i]), 0.8)
        ends = np.array([own.low, own.estimate, own.high])
        expected = np.exp(ends) if name == "A" else ends
        mine = known.constants[name]
        assert (mine.low, mine.estimate, mine.high) == pytest.approx(tuple(expected), rel=1e-9)
    # Under 6ND b = 1 - a, and its interval is the mirror image.
    a, b = known.exponent, known.tokens_exponent
    assert (b.low, b.high) == pytest.approx((1.0 - a.high, 1.0 - a.low), rel=1e-5)


@pytest.mark.parametrize(("kind", "by"), [("bootstrap", "pairs"), ("cluster", "cluster")])
def test_bootstrap_intervals_are_percentiles_of_its_replicates(fitted, kind, by):
    found, obs, said = fitted
    known = law_intervals(found, obs, said, SIX_N, kind)
    drawn = bootstrap(found, obs, replicates=4000, by=by)
    assert known.constants == drawn.constants(0.8)
    a = drawn.exponent(0.8)
    assert (known.exponent.low, known.exponent.high) == pytest.approx((a.low, a.high), rel=1e-12)
    b = known.tokens_exponent
    assert (b.low, b.high) == pytest.approx((1.0 - a.high, 1.0 - a.low), rel=1e-12)


@pytest.mark.parametrize("kind", ["t", "profile", "bootstrap", "cluster"])
def test_a_fit_that_is_not_sound_has_open_intervals_of_any_kind(fitted, kind):
    found, obs, _ = fitted
    lost = replace(found, status="not_converged")
    known = law_intervals(lost, obs, forecast(lost, 1e21, SIX_N), SIX_N, kind)
    ends = {(part.low, part.high) for part in known.constants.values()}
    assert ends == {(0.0, np.inf)}
    assert (known.exponent.low, known.exponent.high) == (-np.inf, np.inf)


def test_what_there_is_not_is_refused(fitted):
    found, obs, said = fitted
    with pytest.raises(InputError, match="intervals are t, profile, bootstrap, cluster, not 'hdi'"):
        law_intervals(found, obs, said, SIX_N, "hdi")
    huber = fit(HOFFMANN, obs, method=Method(objective="huber"))
    with pytest.raises(InputError, match="profile intervals need the objective squares"):
        law_intervals(huber, obs, said, SIX_N, "profile")
    few = obs.select(obs.budget < obs.budgets()[4])
    with pytest.raises(InputError, match="at least 5 budgets or trunks, and there are 4"):
        law_intervals(fit(HOFFMANN, few), few, said, SIX_N, "cluster")
