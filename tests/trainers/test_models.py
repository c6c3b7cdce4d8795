"""The models that training leaves: those that were measured, one a horizon, whole in their file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from analysis.errors import InputError
from trainers.corpus import heldout_windows, load
from trainers.decoders import LLAMA
from trainers.evaluation import evaluate
from trainers.models import KeptModel, read_model, write_model
from trainers.pretrain import Pretrain
from trainers.tokenizer import BYTES, trained
from trainers.transformer import Transformer
from trainers.trial import Measurement, Trial
from trainers.workspace import Scratch


def _trained(trial: Trial, directory: Path) -> dict[int, Measurement]:
    events = Pretrain().train(trial, Scratch(directory, keeps_models=True))
    return {event.tokens: event for event in events if isinstance(event, Measurement)}


def _kept(directory: Path) -> list[KeptModel]:
    paths = sorted((directory / "models").iterdir(), key=lambda path: int(path.stem))
    return [read_model(path, str(path)) for path in paths]


def _loss(kept: KeptModel) -> float:
    """What its weights give on its trial's held-out text."""
    windows = heldout_windows(load(kept.trial.corpus.source), kept.trial.shape.context)
    return evaluate(kept.model, windows, torch.device("cpu"))[0]


def _changed(trial: Trial, **changes: object) -> Trial:
    hyperparameters = dataclasses.replace(trial.hyperparameters, **changes)
    return dataclasses.replace(trial, hyperparameters=hyperparameters)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_from_its_file_alone_has_the_measured_loss(
    make_trial, tmp_path: Path, precision: str
) -> None:
    trial = _changed(make_trial(16, 4e8), precision=precision)
    shape = dataclasses.replace(trial.shape, architecture=LLAMA)
    trial = dataclasses.replace(trial, shape=shape)
    measured = _trained(trial, tmp_path)
    (kept,) = _kept(tmp_path)
    assert kept.trial == trial
    assert (kept.tokens, kept.loss) == (trial.tokens, measured[trial.tokens].loss)
    assert _loss(kept) == kept.loss
    assert kept.model.embedding.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@pytest.mark.slow
def test_every_horizon_of_a_trunk_has_its_own_model(make_trial, tmp_path: Path) -> None:
    trunk = _changed(
        make_trial(16, 4e8), schedule="wsd", decay_fraction=0.2, batch_tokens=512, warmup_steps=2
    )
    trunk = dataclasses.replace(trunk, horizons=(512 * 10, 512 * 20))
    measured = _trained(trunk, tmp_path)
    kept = _kept(tmp_path)
    assert [(model.tokens, model.loss) for model in kept] == [
        (tokens, measured[tokens].loss) for tokens in trunk.horizons
    ]
    assert [_loss(model) for model in kept] == [model.loss for model in kept]


@pytest.mark.slow
def test_a_training_that_blew_up_leaves_none(make_trial, tmp_path: Path) -> None:
    trial = _changed(make_trial(16, 4e8), matrix_rate=1e38, embedding_rate=1e38, head_rate=1e38)
    (measured,) = _trained(trial, tmp_path).values()
    assert (measured.status, measured.loss) == ("diverged", None)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def written(make_trial, tmp_path: Path) -> Path:
    """The file of a model that was not trained."""
    trial = make_trial(8, 1e8)
    path = tmp_path / "model"
    weights = Transformer(trial.shape, 0).state_dict()
    write_model(path, trial=trial, tokens=5, loss=2.5, tokenizer=BYTES, weights=weights)
    return path


@pytest.mark.parametrize("kind", ["trained", "bytes", "none"])
def test_a_model_has_the_tokenizer_with_which_it_was_trained(
    make_trial, tmp_path: Path, kind: str
) -> None:
    trial = make_trial(8, 1e8)
    own = trained(iter(["some words, and é"] * 9), 300, None)
    tokenizer = {"trained": own, "bytes": BYTES, "none": None}[kind]
    weights = Transformer(trial.shape, 0).state_dict()
    path = tmp_path / "model"
    write_model(path, trial=trial, tokens=5, loss=2.5, tokenizer=tokenizer, weights=weights)
    assert read_model(path, "models/x").tokenizer == tokenizer


def test_any_tool_that_reads_safetensors_finds_out_what_it_is(written: Path) -> None:
    with safe_open(written, "numpy") as file:
        told = file.metadata()
    trial = json.loads(told["trial"])
    assert (told["tokens"], told["loss"]) == ("5", "2.5")
    assert (trial["shape"]["width"], trial["shape"]["architecture"]["norm"]) == (8, "layer")
    assert (trial["recipe"]["name"], trial["corpus"]["source"]["kind"]) == ("mini", "stdlib")


def test_a_file_that_is_cut_off_or_foreign_is_said_to_be(written: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    written.write_bytes(written.read_bytes()[:-100])
    foreign = tmp_path / "foreign"
    save_file({"a": torch.zeros(1)}, foreign)
    for path in (written, foreign):
        with pytest.raises(InputError, match=r"^models/x is damaged, or no model of this version"):
            read_model(path, "models/x")


def test_what_the_file_system_refuses_is_its_error(make_trial, tmp_path: Path) -> None:
    """Which workspaces wait for; the library's own would fail the attempt."""
    weights, place = {"a": torch.zeros(1)}, tmp_path / "missing" / "model"
    with pytest.raises(OSError, match="No such file"):
        write_model(
            place,
            trial=make_trial(8, 1e8),
            tokens=1,
            loss=1.0,
            tokenizer=None,
            weights=weights,
        )
