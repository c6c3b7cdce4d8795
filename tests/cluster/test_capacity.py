"""How long trials are expected to take."""

import dataclasses
from pathlib import Path

import pytest

from cluster.capacity import Effort, Pace, estimated_seconds, expected_mfu, mfu, seconds
from cluster.machines import uniform
from cluster.placement import LAUNCH_SECONDS_PER_BLOCK, Placement, place
from orchestrator.planner import make_plan
from orchestrator.spec import read_spec
from trainers.flops import flops_per_token, params, trial_flops
from trainers.gpus import gpu_type
from trainers.shape import Shape

MINI = Path(__file__).parents[2] / "examples/mini.toml"
H100S = uniform(gpus=8, gpu_type="H100")


@pytest.mark.parametrize(
    ("gpu", "total", "published"),
    [
        ("A100", 125.3e6, 0.448),
        ("A100", 356e6, 0.516),
        ("A100", 760e6, 0.569),
        ("A100", 1.316e9, 0.599),
        ("A100", 2.65e9, 0.621),
        ("A100", 6.66e9, 0.642),
        ("H100", 760e6, 0.376),
        ("H100", 1.316e9, 0.418),
        ("H100", 2.65e9, 0.437),
        ("H100", 6.66e9, 0.464),
    ],
)
def test_the_mfu_curve_is_that_of_published_benchmarks(gpu, total, published) -> None:
    """llm-foundry, scripts/train/benchmarking, 8 GPUs (16 for the H100's 760M), 2048 tokens."""
    assert expected_mfu(total, gpu_type(gpu).peak_flops) == pytest.approx(published, rel=0.05)


def test_fp32_is_expected_to_take_what_was_published_or_a_little_longer() -> None:
    """GPT-2 (12 blocks of 768, 50,257 symbols) on an A100, 16 sequences of 1024 in fp32: 1000 ms a
    step, in the chapters of Karpathy's lecture "Let's reproduce GPT-2 (124M)" (2024)."""
    shape = Shape(width=768, depth=12, heads=12, vocabulary=50_257, context=1024)
    gpu = gpu_type("A100")
    published = flops_per_token(shape) * 16 * 1024 / 1.0 / gpu.fp32_flops
    assert published == pytest.approx(0.67, abs=0.005)
    assert (
        0.85 * published < expected_mfu(params(shape).total, gpu.training_flops("fp32")) < published
    )


def test_mini_is_expected_to_take_what_it_was_measured_to_take() -> None:
    """416 CPU seconds for its 28 trials, on the machine of the fit; the fit is good to 10%."""
    plan = make_plan(read_spec(MINI))
    assert sum(map(estimated_seconds, plan.trials)) == pytest.approx(416, rel=0.1)


def test_a_small_trial_takes_what_its_launches_take(make_trial) -> None:
    trial = make_trial(32, 1e10)
    steps = trial.hyperparameters.steps
    expected = seconds(trial, place(trial, H100S), H100S)
    assert expected == pytest.approx(steps * 2 * LAUNCH_SECONDS_PER_BLOCK, rel=0.05)


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
    where = place(trial, bare)
    rows = [_row(trial, "NVIDIA A100-SXM4-80GB", 3 * seconds(trial, where, bare))]
    pace = Pace.from_rows(rows)
    assert seconds(trial, where, bare, pace) == pytest.approx(3 * seconds(trial, where, bare))


def test_a_gpus_rows_set_the_pace_of_its_type_alone(make_trial) -> None:
    trial = make_trial(64, 1e11)
    where = place(trial, H100S)
    rows = [_row(trial, "NVIDIA H100 80GB HBM3", 3 * seconds(trial, where, H100S))]
    pace = Pace.from_rows(rows)
    assert seconds(trial, where, H100S, pace) == pytest.approx(3 * seconds(trial, where, H100S))
    assert mfu(trial, where, H100S, pace) == pytest.approx(mfu(trial, where, H100S) / 3)
    other = uniform(gpus=8, gpu_type="A100")
    assert seconds(trial, where, other, pace) == seconds(trial, where, other)


def test_a_row_on_eight_gpus_is_timed_as_one_on_eight(make_trial) -> None:
    trial = make_trial(64, 1e11)
    eight = Placement(gpus=8)
    taken = 3 * seconds(trial, eight, H100S)
    pace = Pace.from_rows([_row(trial, "8 x NVIDIA H100 80GB HBM3", taken)])
    assert seconds(trial, eight, H100S, pace) == pytest.approx(taken)
