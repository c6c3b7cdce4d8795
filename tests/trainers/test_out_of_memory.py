"""Where memory runs out, the batch is begun anew in smaller passes, with the same result."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers import learner as learners
from trainers import passes, pretrain, transformer
from trainers.decoders import LLAMA
from trainers.learner import Learner
from trainers.memory import LEAST, Passes, fitting_passes
from trainers.pretrain import Pretrain
from trainers.ranks import Ranks
from trainers.recipes import named
from trainers.shape import Shape
from trainers.trial import CorpusId, RecipeId, Trial
from trainers.workspace import Scratch

CPU = torch.device("cpu")
SHAPE = Shape(width=16, depth=2, heads=2, vocabulary=64, context=16, architecture=LLAMA)
SEQUENCES = 11


def _trial(precision: str = "fp32") -> Trial:
    h = named("llama-adamw", {"precision": precision}).resolve(SHAPE, 1e6)
    return Trial(
        trainer="pretrain",
        trainer_version=1,
        shape=SHAPE,
        hyperparameters=dataclasses.replace(h, batch_tokens=SEQUENCES * SHAPE.context),
        corpus=CorpusId(name="", hash="", heldout_hash="", train_tokens=1, source=None),
        recipe=RecipeId(name="", hash=""),
        seed=0,
    )


def _batch(step: int) -> np.ndarray:
    rng = np.random.default_rng(step)
    return rng.integers(0, SHAPE.vocabulary, (SEQUENCES, SHAPE.context + 1))


class Limited:
    """A loss on a device that has memory for so many sequences at a time, from a call on."""

    def __init__(self, learner: Learner, sequences: int, after: int = 0) -> None:
        self._loss, self._sequences, self._after = learner._model.loss, sequences, after
        self.sizes: list[int] = []
        learner._model.loss = self

    def __call__(self, windows: torch.Tensor, counted: int | None = None) -> torch.Tensor:
        self.sizes.append(len(windows))
        if len(windows) > self._sequences and len(self.sizes) > self._after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._loss(windows, counted)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks and passes of a GPU that should have room for eight sequences."""
    monkeypatch.setattr(transformer, "_on_one_core", lambda *_: False)
    monkeypatch.setattr(passes, "room", lambda device: 1e12)
    monkeypatch.setattr("trainers.memory.pass_sequences", lambda context: 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_training_goes_on_as_if_passes_had_been_small_from_the_first_step(
    as_on_a_gpu: None, precision: str, after: int
) -> None:
    """Two passes of six, then four of three; memory may run out when a pass has been done."""
    trial = _trial(precision)
    expected = Learner(trial, CPU, Ranks(), halvings=1)
    learner = Learner(trial, CPU, Ranks())
    limited = Limited(learner, 3)
    with pytest.warns(UserWarning, match="in passes of 6 sequences: this trial goes on in passes"):
        losses = [learner.step(_batch(n), 0.5).item() for n in range(3)]
    assert limited.sizes == [6] + 3 * [3, 3, 3, 3]
    assert losses == [expected.step(_batch(n), 0.5).item() for n in range(3)]
    for name, weight in learner.weights().items():
        assert torch.equal(weight, expected.weights()[name])
    # Not in the first step, and in the midst of a batch: what its first pass gave is dropped.
    learner, again = Learner(trial, CPU, Ranks()), Learner(trial, CPU, Ranks())
    Limited(learner, 3, after=after + 1)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = [learner.step(_batch(n), 0.5).item() for n in range(4)]
    whole = [again.step(_batch(n), 0.5).item() for n in range(4)]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert found == pytest.approx(whole, rel=tolerance)


def test_where_not_one_sequence_fits_blocks_are_computed_again_and_then_it_raises(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, again, counted = Learner(_trial(), CPU, Ranks()), passes.checkpoint, []
    monkeypatch.setattr(passes, "checkpoint", lambda *a, **k: counted.append(1) or again(*a, **k))
    limited = Limited(learner, 0)
    with pytest.warns(UserWarning, match="computed again"), pytest.raises(torch.OutOfMemoryError):
        learner.step(_batch(0), 0.5)
    assert limited.sizes == [6, 3, 2, 1, 1]
    assert learner._passes == LEAST.even(SEQUENCES)
    learner._model.loss = limited._loss
    learner.step(_batch(0), 0.5)
    assert len(counted) == SEQUENCES * SHAPE.depth


def test_a_rank_of_a_model_that_is_shared_out_leaves_it_to_the_next_attempt(
    as_on_a_gpu: None,
) -> None:
    """The others have met it in a pass, and would wait for it in another."""
    learner = Learner(_trial(), CPU, Ranks())
    learner._sharded = True
    limited = Limited(learner, 3)
    with pytest.raises(torch.OutOfMemoryError):
        learner.step(_batch(0), 0.5)
    assert limited.sizes == [6]


def test_ranks_evaluate_in_pieces_of_one_size_whichever_ran_out_of_memory(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share out windows by pieces: of other sizes some would count twice, others never."""

    class Two(Ranks):
        def least(self, number: float) -> float:
            return min(number, 3)  # the other rank's passes

    asked = []
    monkeypatch.setattr(
        learners, "evaluate", lambda *_, sequences: asked.append(sequences) or (1.0, None)
    )
    learner = Learner(_trial(), CPU, Ranks())
    learner._ranks = Two()
    learner.evaluate(None)
    learner._device = torch.device("cuda")
    learner.evaluate(None)
    learner._passes = Passes(sequences=2)
    learner.evaluate(None)
    assert asked == [None, 3, 2]


def test_the_next_attempt_takes_half_for_each_that_ran_out_of_memory(
    tmp_path: Path, make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Ran(Scratch):
        def out_of_memory(self) -> int:
            return 2

    def stopped(*_: object, halvings: int, **__: object) -> None:
        asked.append(halvings)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "Learner", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(Pretrain().train(make_trial(16, 1e9), Ran(tmp_path)))
    assert asked == [2]
    h = _trial().hyperparameters
    for halvings, sequences in ((0, 11), (1, 6), (2, 3), (3, 2), (4, 1)):
        for room in (None, 1e12):
            found = fitting_passes(SHAPE, h, room, halvings=halvings)
            assert found.sequences == sequences
            assert not found.recomputed
    assert fitting_passes(SHAPE, h, None, halvings=9) == Passes(sequences=1, recomputed=True)
