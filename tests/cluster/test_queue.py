"""The order of trials and what they are expected to cost."""

from pathlib import Path

import pytest

from cluster.capacity import estimated_seconds
from cluster.placement import resources
from cluster.queue import ordered
from orchestrator.planner import make_plan
from orchestrator.spec import read_spec

MINI = Path(__file__).parents[2] / "examples/mini.toml"


def test_longest_trials_start_first(make_trial) -> None:
    trials = [make_trial(w, c) for w, c in ((16, 1e10), (64, 1.08e12), (24, 4e10), (64, 1e10))]
    started = ordered(trials)
    seconds = [estimated_seconds(t) for t in started]
    assert seconds == sorted(seconds, reverse=True)
    assert ordered(reversed(trials)) == started


def test_mini_is_expected_to_take_what_it_was_measured_to_take() -> None:
    """416 CPU seconds for its 28 trials, on the machine of the fit; the fit is good to 10%."""
    plan = make_plan(read_spec(MINI))
    assert sum(map(estimated_seconds, plan.trials)) == pytest.approx(416, rel=0.1)


def test_a_gpu_is_taken_where_there_is_one_and_training_needs_it(make_trial) -> None:
    trial = make_trial(16, 1e10)
    assert resources(trial, gpus=0) == {"CPU": 1}
    assert resources(trial, gpus=4) == {"CPU": 1, "GPU": 1}
