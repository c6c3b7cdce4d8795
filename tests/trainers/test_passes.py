"""Memory is spared where it is short, and nothing else changes."""

import dataclasses
from pathlib import Path

import pytest
import torch

from trainers import passes, transformer
from trainers.memory import Passes
from trainers.passes import accumulate
from trainers.pretrain import Pretrain
from trainers.trial import Trial
from trainers.workspace import Scratch


def _told(trial: Trial, directory: Path):
    *_, measured = Pretrain().train(trial, Scratch(directory))
    return measured.loss, measured.loss_stderr, measured.curve


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mini", "llama-adamw"])
def test_computing_blocks_again_changes_no_bit_of_a_training(
    make_trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """On a device that has no room, with the blocks that a GPU runs and a sequence a batch."""
    monkeypatch.setattr(transformer, "_on_one_core", lambda *_: False)
    trial = make_trial(16, 1e9, recipe=recipe)
    h = dataclasses.replace(trial.hyperparameters, batch_tokens=64, steps=30, precision="fp32")
    trial = dataclasses.replace(trial, hyperparameters=h)
    expected = _told(trial, tmp_path)
    again, counted = passes.checkpoint, []
    monkeypatch.setattr(passes, "room", lambda device: 0.0)
    monkeypatch.setattr(passes, "checkpoint", lambda *a, **k: counted.append(1) or again(*a, **k))
    assert _told(trial, tmp_path) == expected
    assert len(counted) >= 30 * trial.shape.depth


@pytest.mark.parametrize(("sequences", "ranks", "each"), [(9, 2, 2), (10, 4, 1), (7, 3, 1)])
def test_every_rank_goes_through_as_many_passes_and_all_together_through_the_batch(
    sequences: int, ranks: int, each: int
) -> None:
    """In passes of four: of nine sequences two ranks have five and four."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(sequences, 3, dtype=torch.float64, generator=generator)
    whole = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (batch @ whole).square().mean().backward()
    shared, total = torch.ones(3, dtype=torch.float64, requires_grad=True), 0.0
    for rank in range(ranks):
        passed = []
        total += accumulate(
            lambda windows: (windows @ shared).square().mean(),
            batch[rank::ranks],
            Passes(sequences=4),
            sequences,
            lambda counted=passed: counted.append(1),
            ranks=ranks,
        ).item()
        assert len(passed) == each
    assert total == pytest.approx((batch @ whole).square().mean().item())
    torch.testing.assert_close(shared.grad, whole.grad)
