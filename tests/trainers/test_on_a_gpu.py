"""What only a GPU can show of the trainer: `pytest -m gpu tests/trainers`."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from trainers import compiling
from trainers.decoders import LLAMA
from trainers.device import reproducible
from trainers.learner import Learner
from trainers.ranks import Ranks
from trainers.recipes import named
from trainers.shape import Shape
from trainers.transformer import Transformer
from trainers.trial import CorpusId, RecipeId, Trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")
SEQUENCES = 20


def _trial(
    recipe: str = "llama-adamw", precision: str = "bf16", vocabulary: int = 1000, **parts: int
) -> Trial:
    architecture = dataclasses.replace(named(recipe).architecture, **parts)
    shape = Shape(
        width=256,
        depth=2,
        heads=4,
        vocabulary=vocabulary,
        context=1024,
        architecture=architecture,
    )
    h = named(recipe, {"precision": precision}).resolve(shape, 1e7)
    return Trial(
        trainer="pretrain",
        trainer_version=1,
        shape=shape,
        hyperparameters=dataclasses.replace(h, batch_tokens=SEQUENCES * 1024),
        corpus=CorpusId(name="", hash="", heldout_hash="", train_tokens=1, source=None),
        recipe=RecipeId(name="", hash=""),
        seed=0,
    )


def _losses(trial: Trial, device: torch.device, steps: int = 3) -> list[float]:
    learner = Learner(trial, device, Ranks())
    learner.prepare()
    draw = np.random.default_rng(0)
    size = (SEQUENCES, trial.shape.context + 1)
    batches = [draw.integers(0, trial.shape.vocabulary, size) for _ in range(steps)]
    return [learner.step(batch, 1.0).item() for batch in batches]


@pytest.mark.parametrize("recipe", ["llama-adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-4), ("bf16", 3e-2)])
def test_losses_are_those_of_a_core(
    monkeypatch: pytest.MonkeyPatch, recipe: str, compiled: bool, precision: str, error: float
) -> None:
    """With 1000 symbols, which are no multiple of 64, and passes of ten sequences for sixteen."""
    monkeypatch.setattr(compiling, "pays", lambda trial, device, *_: compiled and device == GPU)
    trial = _trial(recipe, precision)
    assert _losses(trial, GPU) == pytest.approx(_losses(trial, torch.device("cpu")), abs=error)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("queries_per_key", [1, 2])
def test_attention_never_writes_all_weights_down(precision: str, queries_per_key: int) -> None:
    shape = dataclasses.replace(_trial().shape, depth=1)
    llama = dataclasses.replace(LLAMA, queries_per_key=queries_per_key)
    model = Transformer(dataclasses.replace(shape, architecture=llama), 0).to(GPU)
    if precision == "bf16":
        model = model.bfloat16()
    windows = torch.zeros(2, 1025, dtype=torch.int64, device=GPU)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        model.loss(windows).backward()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profiler.key_averages()).lower()
    assert "_scaled_dot_product_attention_math" not in names
    assert any(kind in names for kind in ("flash", "efficient", "cudnn"))


@pytest.mark.parametrize("recipe", ["llama-adamw", "muon"])
def test_deterministic_training_gives_the_same_bits_again(recipe: str) -> None:
    trial = _trial(recipe)
    with reproducible(GPU, True):
        assert _losses(trial, GPU) == _losses(trial, GPU)


def test_a_trial_for_which_memory_is_too_short_goes_on_in_smaller_passes() -> None:
    """The passes are chosen while there is room, of which another process then takes its part."""
    torch.cuda.empty_cache()
    learner = Learner(_trial(vocabulary=50_257), GPU, Ranks())
    total = torch.cuda.get_device_properties(GPU).total_memory
    taken = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_per_process_memory_fraction((taken + 1.2e9) / total)
        with pytest.warns(UserWarning, match="memory ran out in passes of"):
            loss = learner.step(np.zeros((SEQUENCES, 1025), np.int64), 0.1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.isfinite(loss)
