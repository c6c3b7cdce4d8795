"""How long trials are expected to take."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.capacity import estimated_seconds, mfu, seconds, times
from cluster.effort import Effort
from cluster.machines import uniform
from cluster.pace import Pace
from cluster.placement import Placement
from orchestrator.planner import make_plan
from orchestrator.spec import read_spec
from trainers import compiling
from trainers.compile_costs import EAGER_FACTOR, LAUNCH_SECONDS_PER_BLOCK
from trainers.flops import flops_per_token, params, trial_flops
from trainers.gpus import gpu_type

WHOLE = Placement(gpus=1)
MINI = Path(__file__).parents[2] / "examples/mini.toml"
H100S = uniform(gpus=8, gpu_type="H100")


def test_mini_is_expected_to_take_what_it_was_measured_to_take() -> None:
    """416 CPU seconds for its 28 trials, on the machine of the fit; the fit is good to 10%."""
    plan = make_plan(read_spec(MINI))
    assert sum(map(estimated_seconds, plan.trials)) == pytest.approx(416, rel=0.1)


def test_a_small_trial_takes_what_its_launches_take(make_trial) -> None:
    """Compiling would take longer than it saves, so that the kernels of each step are launched."""
    trial = make_trial(32, 1e10)
    steps = trial.hyperparameters.steps
    found = times(trial, WHOLE, H100S)
    launching = steps * 2 * LAUNCH_SECONDS_PER_BLOCK
    assert found.compiling == 0
    assert found.training == pytest.approx(EAGER_FACTOR * launching, rel=0.05)


def test_a_large_trial_takes_its_flops_over_the_speed(make_trial) -> None:
    """1.3e9 parameters at 62% of 67 TFLOP/s: 1e19 FLOPs are 67 hours, and 33 on two GPUs."""
    trial = make_trial(32, 1e10)
    work = dataclasses.replace(
        Effort.of(trial), params_total=1.3e9, flops=1e19, tokens=1.3e9, batch_tokens=1e6
    )
    one, two = (work.on_gpus(gpu_type("H100"), gpus) for gpus in (1, 2))
    assert one == pytest.approx(1e19 / (0.624 * 67e12), rel=0.01)
    assert two == pytest.approx(one / 2)


def test_a_simulated_trial_takes_what_it_is_told(make_trial) -> None:
    trial = dataclasses.replace(
        make_trial(16, 1e10), trainer="simulated", settings=(("seconds", 7.0),)
    )
    assert seconds(trial, Placement(gpus=1), H100S) == 7.0
    assert mfu(trial, Placement(gpus=1), H100S) == 0.0


def _row(trial, device: str, took: float) -> dict:
    return {
        "device": device,
        "seconds": took,
        "flops_exact": trial_flops(trial),
        "tokens": trial.tokens,
        "batch_tokens": trial.hyperparameters.batch_tokens,
        "params_total": params(trial.shape).total,
        "width": trial.shape.width,
        "depth": trial.shape.depth,
        "context": trial.shape.context,
    }


def test_what_was_measured_takes_the_place_of_what_was_expected(make_trial) -> None:
    """A machine half as fast for small models and four times as fast for larger ones."""
    small, large = make_trial(16, 1e10), make_trial(128, 1e12)
    rows = [
        _row(small, "arm64 CPU, 1 thread", 2 * estimated_seconds(small)),
        _row(large, "arm64 CPU, 1 thread", estimated_seconds(large) / 4),
        _row(large, "simulated", 1e9),
        {**_row(large, "arm64 CPU, 1 thread", 1e9), "seconds": None},
    ]
    pace, core = Pace.from_rows(rows), uniform(cpus=2)
    for width, factor in ((12, 2), (20, 2), (96, 0.25), (256, 0.25)):
        trial = make_trial(width, 1e11)
        expected = factor * estimated_seconds(trial)
        assert seconds(trial, Placement(), core, pace) == pytest.approx(expected)
    gpu = Placement(gpus=1)  # of which nothing is known
    assert seconds(large, gpu, H100S, pace) == seconds(large, gpu, H100S)


def test_a_trunks_rows_are_timed_by_what_each_horizon_takes(make_trial) -> None:
    """A machine a third as fast as expected, whatever share of the trunk a row stands for."""
    made = make_trial(64, 1e11)
    h = dataclasses.replace(
        made.hyperparameters, schedule="wsd", warmup_steps=1, decay_fraction=0.2
    )
    horizons = tuple(n * h.batch_tokens for n in (100, 200, 400, 800))
    trunk = dataclasses.replace(made, hyperparameters=h, horizons=horizons)
    took, flops = 3 * estimated_seconds(trunk), trial_flops(trunk)
    rows = [
        {
            **_row(trunk, "arm64 CPU, 1 thread", took * steps / trunk.total_steps),
            "tokens": tokens,
            "flops_exact": flops_per_token(trunk.shape) * tokens,
            "flops_spent": flops * steps / trunk.total_steps,
        }
        for tokens, steps in trunk.marginal_steps.items()
    ]
    pace = Pace.from_rows(rows)
    assert pace.factor(None, params(trunk.shape).total) == pytest.approx(3)
    assert seconds(trunk, Placement(), uniform(cpus=2), pace) == pytest.approx(took)
    separate = sum(
        seconds(dataclasses.replace(trunk, horizons=(tokens,)), Placement(), uniform(cpus=2), pace)
        for tokens in horizons
    )
    assert took < 0.65 * separate  # one trunk of them, as in the benchmark


def test_rows_of_a_type_that_ray_calls_the_same_set_the_pace(make_trial) -> None:
    """Rows have the driver's name, with form and memory; Ray says A100, taken for 40 GB."""
    trial, bare = make_trial(64, 1e11), uniform(gpus=8, gpu_type="A100")
    rows = [_row(trial, "NVIDIA A100-SXM4-80GB", 3 * _plain(trial, bare))]
    pace = Pace.from_rows(rows)
    assert seconds(trial, WHOLE, bare, pace) == pytest.approx(3 * seconds(trial, WHOLE, bare))


def test_a_gpus_rows_set_the_pace_of_its_type_alone(make_trial) -> None:
    trial = make_trial(64, 1e11)
    pace = Pace.from_rows([_row(trial, "NVIDIA H100 80GB HBM3", 3 * _plain(trial, H100S))])
    assert seconds(trial, WHOLE, H100S, pace) == pytest.approx(3 * seconds(trial, WHOLE, H100S))
    assert mfu(trial, WHOLE, H100S, pace) == pytest.approx(mfu(trial, WHOLE, H100S) / 3)
    other = uniform(gpus=8, gpu_type="A100")
    assert seconds(trial, WHOLE, other, pace) == seconds(trial, WHOLE, other)


def test_a_row_on_eight_gpus_is_timed_as_one_on_eight(make_trial) -> None:
    trial = make_trial(64, 1e11)
    eight = Placement(gpus=8)
    row = _row(trial, "8 x NVIDIA H100 80GB HBM3", 3 * _plain(trial, H100S, 8))
    pace = Pace.from_rows([row])
    assert seconds(trial, eight, H100S, pace) == pytest.approx(3 * seconds(trial, eight, H100S))


def _plain(trial, cluster, gpus: float = 1.0) -> float:
    """Expected seconds of a training of which nobody says whether it was compiled."""
    return Effort.of(trial).on_gpus(cluster.nodes[0].gpu, gpus)


def _long(trial, factor: int):
    """The same trial with so many times the steps, so that compiling it pays."""
    h = trial.hyperparameters
    return dataclasses.replace(
        trial, hyperparameters=dataclasses.replace(h, steps=factor * h.steps)
    )


def test_compilation_is_apart_from_training(make_trial) -> None:
    """It adds to the time, and takes nothing off the MFU, which is of training alone."""
    trial = _long(make_trial(64, 1e11), 100)
    found = times(trial, WHOLE, H100S)
    assert found.compiling == pytest.approx(15 + 2 * 0.3)
    assert found.training == pytest.approx(_plain(trial, H100S))
    assert seconds(trial, WHOLE, H100S) == found.compiling + found.training
    peak = gpu_type("H100").fp32_flops
    assert mfu(trial, WHOLE, H100S) == pytest.approx(trial_flops(trial) / found.training / peak)


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA X1"])
def test_a_trial_is_compiled_where_its_forecast_says_so(
    make_trial, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int
) -> None:
    """By its numbers alone, so that all attempts and ranks decide alike: nothing is measured on a
    GPU without a datasheet, and neither its memory nor a ledger counts."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    cluster = uniform(gpus=8, gpu_type=device, gpu_memory=24e9)
    decisions = []
    for factor in (1, 3, 10, 12, 15, 20, 30, 60, 100, 1000):
        trial = _long(make_trial(64, 1e11), factor)
        row = _row(trial, device, 1e4) | {"compile_seconds": 70.0}
        for pace in (Pace(), Pace.from_rows([row])):
            found = times(trial, Placement(gpus=gpus), cluster, pace)
            decisions.append(found.compiling > 0)
            assert compiling.pays(trial, torch.device("cuda"), gpus) == decisions[-1]
    assert set(decisions) == {True, False}


def test_compile_times_of_a_ledger_take_the_place_of_the_allowance(make_trial) -> None:
    """70 s at depth 2, on whatever GPU, beside what training took, which is what was expected."""
    trial = _long(make_trial(64, 1e11), 1000)
    took = _plain(trial, H100S)
    row = _row(trial, "NVIDIA H100 80GB HBM3", took) | {"compile_seconds": 70.0}
    found = times(trial, WHOLE, H100S, Pace.from_rows([row]))
    assert (found.compiling, found.training) == pytest.approx((70, took))
    other = uniform(gpus=8, gpu_type="L4")
    assert times(trial, WHOLE, other, Pace.from_rows([row])).compiling == pytest.approx(70)


def test_a_row_of_training_that_was_not_compiled_says_how_fast_that_is(make_trial) -> None:
    """Eager training is taken to last half as long again, and this was twice as slow as that."""
    short, long = make_trial(64, 1e11), _long(make_trial(64, 1e11), 1000)
    took = 2 * EAGER_FACTOR * _plain(short, H100S)
    row = _row(short, "NVIDIA H100 80GB HBM3", took) | {"compile_seconds": 0.0}
    pace = Pace.from_rows([row])
    assert times(short, WHOLE, H100S, pace).whole == pytest.approx(took)
    found = times(long, WHOLE, H100S, pace)
    assert found.compiling > 0
    assert found.training == pytest.approx(2 * _plain(long, H100S))


def test_rows_of_a_share_set_the_pace_of_that_share_first(make_trial) -> None:
    """A quarter of a GPU was half as fast as forecast, a whole one as fast as forecast."""
    trial, cluster = _long(make_trial(64, 1e11), 1000), uniform(gpus=1, gpu_type="L4", mps=True)
    effort, gpu = Effort.of(trial), gpu_type("L4")
    quarter = 2 * effort.on_gpus(gpu, 1 / 4, mps=True)
    pace = Pace.from_rows(
        [
            _row(trial, "NVIDIA L4", effort.on_gpus(gpu)),
            _row(trial, "1/4 x NVIDIA L4 by MPS", quarter),
        ]
    )
    for gpus, expected in ((1, effort.on_gpus(gpu)), (1 / 4, quarter)):
        found = times(trial, Placement(gpus=gpus), cluster, pace)
        assert found.training == pytest.approx(expected)


def test_a_gpu_that_nobody_knows_has_the_pace_of_its_own_rows(make_trial) -> None:
    trial = _long(make_trial(64, 1e11), 1000)
    cluster = uniform(gpus=1, gpu_type="NVIDIA X1", gpu_memory=24e9)
    took = _plain(trial, cluster) / 5
    pace = Pace.from_rows([_row(trial, "NVIDIA X1", took)])
    assert times(trial, WHOLE, cluster, pace).training == pytest.approx(took)
