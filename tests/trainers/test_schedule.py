"""The cosine schedule: warm-up, half-way and end."""

from itertools import pairwise

import pytest

from trainers.schedule import cosine


def test_cosine_is_linear_first_half_in_the_middle_and_ends_at_its_final_fraction() -> None:
    factors = [cosine(s, steps=1000, warmup_steps=100, final_fraction=0.1) for s in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[49] == pytest.approx(0.5, rel=0.02)
    assert max(factors) == pytest.approx(1.0, abs=0.03)
    assert factors[500] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a > b for a, b in pairwise(factors[100:]))
