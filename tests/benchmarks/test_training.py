"""The training benchmark's pieces, those for GPUs too, at tiny sizes on a CPU."""

import pytest

from benchmarks.sharing import sharing
from benchmarks.steps import Work, ratio
from benchmarks.training import cell, gpu_shapes, mini_shape
from trainers.flops import flops_per_token, params

pytestmark = pytest.mark.slow
TINY = Work(shape=mini_shape(8), sequences=2)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that halves its speed between rounds changes no ratio."""
    assert ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2.0


def test_a_cell_has_every_rival_and_counts_flops_as_the_trainer_does() -> None:
    pytest.importorskip("transformers")
    found = cell(TINY, 1e9, rounds=2, seconds=0.02)
    assert all(value is not None and value > 0 for value in found.values())
    assert found["mfu"] == pytest.approx(
        found["tokens_per_second"] * flops_per_token(TINY.shape) / 1e9
    )


def test_trials_that_share_a_device_are_timed_at_once_and_in_turn() -> None:
    found = sharing(TINY, trials=2, steps=20)
    assert found["trials"] == 2
    assert min(found["seconds_together"], found["seconds_in_turn"]) > 0
    assert found["speedup"] == pytest.approx(found["seconds_in_turn"] / found["seconds_together"])


def test_the_models_for_gpus_are_those_of_their_names() -> None:
    """With the head: 85M and 302M in blocks, as GPT-2 small and medium, and 50,304 symbols."""
    assert [params(shape).matmul for shape in gpu_shapes()] == pytest.approx(
        [125e6, 350e6], rel=0.02
    )
