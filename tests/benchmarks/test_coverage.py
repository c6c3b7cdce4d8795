"""The benchmark of coverage measures the intervals that users are shown."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.combined import combine, with_discrepancy
from analysis.headline import headline
from benchmarks.coverage import (
    COST,
    DESIGNS,
    LEVEL,
    REACH,
    TRUTHS,
    bases,
    discrepancy,
    observations,
    scatter,
)


@pytest.mark.parametrize(
    ("truth", "design", "noise"),
    [
        ("gamma 0.6", "symmetric", "shared by budget"),
        ("hoffmann", "few points", "normal"),
        # Off centre two budgets leave Kaplan's law so flat a minimum that solving many sweeps
        # together and one alone stop at different points of one objective.
        ("kaplan", "drifting", "normal"),
    ],
)
def test_a_simulated_interval_is_that_of_a_headline(truth, design, noise):
    """Fits of many sweeps solved together, and of one alone as `isoflop fit` does it."""
    law, theta = TRUTHS[truth]
    obs = observations(law, theta, DESIGNS[design])
    losses = obs.loss * np.exp(scatter(noise, obs, np.random.default_rng(1), 4))
    flops = REACH * float(obs.flops.max())
    made, _ = bases(obs, losses)
    for r, basis in enumerate(made[-1]):
        known = discrepancy(obs, losses[r], [item[r] for item in made[:-1]])
        mine = with_discrepancy(combine(basis, flops, COST, LEVEL), known, math.log(REACH))
        shown = headline(replace(obs, loss=losses[r]), flops, COST, LEVEL)
        assert (known.source, known.back_tests) == (
            shown.discrepancy.source,
            shown.discrepancy.back_tests,
        )
        for one, two in ((mine.params, shown.params), (mine.loss, shown.loss)):
            ends = (two.low, two.estimate, two.high)
            assert (one.low, one.estimate, one.high) == pytest.approx(ends, rel=1e-3)
