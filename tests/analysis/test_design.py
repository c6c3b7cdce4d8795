import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.design import MAX_SPAN, Centre, propose
from analysis.errors import InputError

BUILDABLE = np.geomspace(1e4, 1e8, 41)


def steady(params=1e6, factor=1.3):
    return lambda flops: Centre(params, params / factor, params * factor)


def growing(flops):
    params = 1e6 * math.sqrt(flops / 1e15)
    return Centre(params, params / 1.2, params * 1.2)


def test_sizes_are_even_in_ln_n_and_centred_on_the_forecast():
    found = propose(forecast_at=steady(), next_flops=1e15, spend=None, params=BUILDABLE)
    chosen = BUILDABLE[list(found.indices)]
    assert len(chosen) == 7
    assert found.spend == 7e15
    assert found.reason is None
    assert math.sqrt(chosen[0] * chosen[-1]) == pytest.approx(1e6, rel=0.15)
    steps = np.diff(np.log(chosen))
    # Even to within one step of what can be built.
    assert np.ptp(steps) < 1.001 * math.log(BUILDABLE[1] / BUILDABLE[0])
    assert chosen[-1] / chosen[0] == pytest.approx(8.0, rel=0.3)


def test_a_wide_interval_widens_the_grid_up_to_a_limit():
    found = propose(forecast_at=steady(factor=5), next_flops=1e15, spend=None, params=BUILDABLE)
    chosen = BUILDABLE[list(found.indices)]
    assert chosen[0] < 1.15e6 / 5
    assert chosen[-1] > 0.87e6 * 5
    limited = propose(forecast_at=steady(factor=50), next_flops=1e15, spend=None, params=BUILDABLE)
    assert limited.high / limited.low == pytest.approx(MAX_SPAN)
    assert "wider than the 64x" in limited.reason
    vague = propose(forecast_at=steady(factor=1e9), next_flops=1e15, spend=None, params=BUILDABLE)
    assert vague.indices == limited.indices


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (1e5, math.inf), (0.0, 1e7)])
def test_a_forecast_without_an_interval_gets_no_sizes(low, high):
    with pytest.raises(InputError, match=r"the forecast has no interval: N_opt, 1e\+06 parameters"):
        propose(
            forecast_at=lambda flops: Centre(1e6, low, high),
            next_flops=1e15,
            spend=None,
            params=BUILDABLE,
        )


@given(
    spend=st.floats(3e14, 1e17),
    next_flops=st.floats(1e14, 1e16),
    sizes=st.integers(3, 12),
    factor=st.floats(1.01, 100),
)
def test_a_proposal_keeps_within_its_spend_with_distinct_ascending_sizes(
    spend, next_flops, sizes, factor
):
    found = propose(
        forecast_at=steady(factor=factor),
        next_flops=next_flops,
        spend=spend,
        params=BUILDABLE,
        sizes=sizes,
    )
    assert found.spend <= spend
    assert found.spend == len(found.indices) * found.flops
    assert 3 <= len(found.indices) <= sizes
    assert list(found.indices) == sorted(set(found.indices))
    assert BUILDABLE[found.indices[0]] < found.centre < BUILDABLE[found.indices[-1]]
    assert found.flops <= next_flops
    as_asked = len(found.indices) == sizes and found.flops == next_flops
    assert as_asked or "instead of" in found.reason


def test_a_small_spend_takes_sizes_first_and_then_the_budget():
    asked = {"forecast_at": growing, "next_flops": 1e15, "params": BUILDABLE}
    five = propose(spend=5.5e15, **asked)
    assert (len(five.indices), five.flops) == (5, 1e15)
    assert five.reason.startswith("5 sizes instead of 7: the spend of 5.5e+15")
    three = propose(spend=3.5e15, **asked)
    assert (len(three.indices), three.flops) == (3, 1e15)
    assert "without a check" in three.reason
    lower = propose(spend=1.5e15, top_flops=2e14, **asked)
    assert lower.flops == pytest.approx(5e14)
    assert len(lower.indices) == 3
    # The forecast is asked again at the lower budget.
    assert lower.centre == pytest.approx(1e6 * math.sqrt(0.5))


def test_a_spend_below_three_trials_above_the_top_budget_is_refused_with_the_numbers():
    with pytest.raises(
        InputError, match=r"1e\+15 FLOPs buys 3 trials of 3\.33e\+14.*already 3e\+14.*1\.08e\+15"
    ):
        propose(forecast_at=growing, next_flops=1e15, spend=1e15, params=BUILDABLE, top_flops=3e14)


def test_few_buildable_sizes_are_all_taken_and_too_few_refused():
    four = np.array([5e5, 9e5, 1.5e6, 2e6])
    found = propose(forecast_at=steady(), next_flops=1e15, spend=None, params=four)
    assert found.indices == (0, 1, 2, 3)
    assert "4 sizes instead of 7: no more can be built" in found.reason
    assert "span 4.0x instead of 8x" in found.reason
    with pytest.raises(InputError, match="only 2 sizes can be built"):
        propose(forecast_at=steady(), next_flops=1e15, spend=None, params=four[:2])


def test_shapes_of_one_n_count_as_one_size():
    twins = np.repeat(BUILDABLE, 2)
    found = propose(forecast_at=steady(), next_flops=1e15, spend=None, params=twins)
    assert len(set(twins[list(found.indices)])) == 7
    with pytest.raises(InputError, match="only 1 size can be built"):
        propose(forecast_at=steady(), next_flops=1e15, spend=None, params=np.full(9, 1e6))


@pytest.mark.parametrize("params", [1e3, 1e4, 1e8, 1e12, math.inf])
def test_a_forecast_that_cannot_be_built_is_refused(params):
    with pytest.raises(InputError, match="optimum"):
        propose(forecast_at=steady(params), next_flops=1e15, spend=None, params=BUILDABLE)


def test_senseless_requests_are_refused_by_name():
    asked = {"forecast_at": steady(), "next_flops": 1e15, "spend": None, "params": BUILDABLE}
    with pytest.raises(InputError, match="at least 3 sizes, not 2"):
        propose(sizes=2, **asked)
    with pytest.raises(InputError, match="factor above 1"):
        propose(min_span=1.0, **asked)
