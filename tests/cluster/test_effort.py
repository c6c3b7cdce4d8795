"""How long trainings take by their numbers: MFU, and what processes leave each other of a GPU."""

import dataclasses

import pytest

from cluster.effort import MPS_OVERLAP, Effort, share_speed
from trainers.expected_mfu import expected_mfu
from trainers.flops import flops_per_token, params
from trainers.gpus import gpu_type
from trainers.shape import Shape


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


@pytest.fixture
def effort(make_trial) -> Effort:
    return Effort.of(make_trial(64, 1e11))


def _busy(effort: Effort, share: float) -> Effort:
    """The same, with the FLOPs of which an L4 is busy for so much of the time of the launches."""
    fresh = dataclasses.replace(effort, params_total=1e8)
    launches = fresh.tokens / fresh.batch_tokens * fresh.depth * 0.4e-3
    peak = gpu_type("L4").fp32_flops
    flops = share * launches * peak * expected_mfu(fresh.params_total, peak)
    return dataclasses.replace(fresh, flops=flops)


@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 3 / 4, 1])
def test_the_busy_share_and_the_time_are_of_one_speed(effort, share: float) -> None:
    """Not of the datasheet's peak, by which a GPU was taken to be two to four times less busy."""
    assert _busy(effort, share).busy(gpu_type("L4")) == pytest.approx(share)
    assert _busy(effort, 8).busy(gpu_type("L4")) == 1


@pytest.mark.parametrize("busy", [1 / 16, 1 / 4, 1 / 2, 1])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_equal_trials_on_equal_shares_take_what_they_need_of_the_gpu(effort, busy, count) -> None:
    """As long as one alone while the GPU has time for all; from then on, one after another."""
    work, gpu = _busy(effort, busy), gpu_type("L4")
    alone, together = work.on_gpus(gpu), work.on_gpus(gpu, 1 / count)
    assert together == pytest.approx(alone * max(1, count * busy))
    assert together >= alone
    # No schedule of the GPU does more: what `count` trials need of it, one by one, is no longer.
    assert count * alone * busy <= together * (1 + 1e-9)


def test_a_whole_gpu_is_no_share_and_mps_does_not_matter_to_it(effort) -> None:
    assert share_speed(1, 1) == 1
    gpu = gpu_type("H100")
    assert effort.on_gpus(gpu, 1, mps=True) == effort.on_gpus(gpu, 1)
    assert effort.on_gpus(gpu, 2, mps=True) == effort.on_gpus(gpu, 2)


@pytest.mark.parametrize("total", [1e6, 3e7, 1e9, 1e12])
def test_mps_helps_small_models_most_and_never_beyond_the_largest_mfu(effort, total) -> None:
    gpu = gpu_type("H100")
    work = dataclasses.replace(effort, params_total=total, flops=1e20)
    busy, alone = work.busy(gpu, mps=True), work.busy(gpu)
    assert alone == 1
    assert expected_mfu(total, gpu.fp32_flops) / expected_mfu(1e99, gpu.fp32_flops) == (
        pytest.approx(busy ** (1 / MPS_OVERLAP))
    )
    larger = dataclasses.replace(work, params_total=10 * total)
    assert busy < larger.busy(gpu, mps=True) <= 1
