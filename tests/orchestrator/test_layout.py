"""Whole GPUs or shares of them, by what is done sooner."""

import dataclasses

import pytest

from cluster.budget import Caps
from cluster.capacity import ACTOR_SECONDS, GAP_SECONDS, seconds
from cluster.effort import Effort
from cluster.machines import Cluster, uniform
from cluster.pace import Pace
from cluster.placement import Placement
from orchestrator.layout import Layout, lay_out
from trainers.shape import Shape
from trainers.trial import Trial

GPU = uniform(gpus=1, gpu_type="H100")


@pytest.fixture
def trials(make_trial):
    """So many equal trials of one block, which keep an H100 busy by their sequences a step."""

    def make(count: int, sequences: int = 1, steps: int = 10_000_000) -> list[Trial]:
        trial = make_trial(32, 1e10)
        shape = Shape(width=64, depth=1, heads=1, vocabulary=256, context=64)
        h = dataclasses.replace(
            trial.hyperparameters, batch_tokens=64 * sequences, steps=steps, optimizer="adamw"
        )
        made = dataclasses.replace(trial, shape=shape, hyperparameters=h)
        return [dataclasses.replace(made, seed=seed) for seed in range(count)]

    return make


def _lay_out(trials: list[Trial], cluster: Cluster = GPU, **more) -> Layout:
    return lay_out(trials, cluster, pace=Pace(), **more)


def test_eight_trials_that_hardly_use_a_gpu_take_as_long_as_one(trials) -> None:
    """Each at its own pace on an eighth; on the whole GPU one after another."""
    several = trials(8)
    found = _lay_out(several)
    alone = seconds(several[0], Placement(gpus=1), GPU)
    assert {job.placement.gpus for job in found.jobs} == {1 / 8}
    assert found.schedule.makespan == pytest.approx(alone + ACTOR_SECONDS)
    sharing = found.sharing
    assert sharing is not None
    assert (sharing.used, sharing.trials) == (True, 8)
    expected = 8 * alone + ACTOR_SECONDS + 7 * GAP_SECONDS
    assert sharing.makespan_unshared == pytest.approx(expected)
    assert sharing.gpu_seconds == pytest.approx(alone)
    assert sharing.gpu_seconds_unshared == pytest.approx(8 * alone)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 11])
def test_shares_never_take_longer_than_whole_gpus_by_the_forecast(trials, count: int) -> None:
    several = trials(count, sequences=16)
    sharing = _lay_out(several).sharing
    found = _lay_out(several).schedule.makespan
    if sharing is not None:
        assert found == min(sharing.makespan, sharing.makespan_unshared)


def test_one_trial_alone_gains_nothing_by_a_share(trials) -> None:
    found = _lay_out(trials(1))
    assert found.sharing is not None
    assert not found.sharing.used
    assert found.jobs[0].placement.gpus == 1


def test_trials_that_fill_a_gpu_do_not_share_it(trials) -> None:
    several = trials(8, sequences=256)
    assert Effort.of(several[0]).busy(GPU.nodes[0].gpu) == 1
    found = _lay_out(several)
    assert found.sharing is None
    assert {job.placement.gpus for job in found.jobs} == {1}


def test_mps_is_worth_what_kernels_overlap(trials) -> None:
    """Without it, trials that keep the GPU busy are done no sooner on shares."""
    several = trials(8, sequences=256)
    without = _lay_out(several).schedule.makespan
    found = _lay_out(several, GPU.with_mps)
    busy = Effort.of(several[0]).busy(GPU.nodes[0].gpu, mps=True)
    assert found.sharing is not None
    assert found.sharing.used
    assert found.schedule.makespan == pytest.approx(busy * without, rel=0.01)


def test_shares_let_a_cap_admit_more_trials_though_each_takes_longer(trials) -> None:
    """GPU-hours for two whole GPUs' trials are enough for all eight on eighths."""
    several = trials(8)
    alone = seconds(several[0], Placement(gpus=1), GPU)
    found = _lay_out(several, caps=Caps(gpu_hours=2.5 * alone / 3600))
    assert not found.schedule.held
    assert found.sharing is not None
    assert found.sharing.gpu_seconds_unshared == pytest.approx(2 * alone)


def test_trials_that_ask_for_a_share_themselves_are_no_choice(trials) -> None:
    asked = [
        dataclasses.replace(trial, trainer="simulated", settings=(("gpus", 0.25),))
        for trial in trials(4)
    ]
    found = _lay_out(asked)
    assert found.sharing is None
    assert {job.placement.gpus for job in found.jobs} == {1 / 4}


def test_what_is_left_of_trials_is_scheduled(trials) -> None:
    several = trials(8, sequences=256)
    whole = _lay_out(several)
    half = _lay_out(
        several,
        adjust=lambda jobs: [dataclasses.replace(job, seconds=job.seconds / 2) for job in jobs],
    )
    assert half.schedule.makespan == pytest.approx(whole.schedule.makespan / 2, rel=0.01)
