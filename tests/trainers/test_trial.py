"""A trial is its content: what changes its key, and what does not."""

import dataclasses
import json
import math

import pytest

from analysis.errors import InputError
from trainers.shape import Architecture, Shape
from trainers.trial import RecipeId, Trial


@pytest.fixture
def trial(make_trial) -> Trial:
    return make_trial(24, 4e10)


def test_a_trial_survives_json(trial: Trial) -> None:
    again = Trial.from_dict(json.loads(json.dumps(trial.to_dict())))
    assert again == trial
    assert again.key == trial.key


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"trainer_version": 99},
        {"trainer": "simulated"},
        {"settings": (("noise", 0.1),)},
    ],
)
def test_content_changes_the_key(trial: Trial, change: dict) -> None:
    assert dataclasses.replace(trial, **change).key != trial.key


OTHER = {
    "architecture": Architecture(norm="rms"),
    "optimizer": "adamw",
    "schedule": "wsd",
    "precision": "bf16",
    **dict.fromkeys(("beta1", "beta2", "momentum", "final_fraction", "decay_fraction"), 0.5),
}


@pytest.mark.parametrize("part", ["shape", "hyperparameters"])
def test_every_value_of_shape_and_hyperparameters_is_in_the_key(trial: Trial, part: str) -> None:
    value = getattr(trial, part)
    for item in dataclasses.fields(value):
        old = getattr(value, item.name)
        new = OTHER[item.name] if item.name in OTHER else old * 4 + 4
        changed = dataclasses.replace(
            trial, **{part: dataclasses.replace(value, **{item.name: new})}
        )
        assert changed.key != trial.key, item.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix_rate": -0.02}, "matrix_rate is -0.02, but it should be finite and above 0"),
        ({"head_rate": math.inf}, "head_rate is inf, but it should be finite and above 0"),
        ({"embedding_rate": math.nan}, "embedding_rate is nan, but it should be finite and above"),
        ({"beta2": 1.0}, "beta2 is 1, but it should be from 0 to below 1"),
        ({"steps": 0}, "steps is 0, but it should be at least 1"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5, but it should be from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but it should be finite and at least 0"),
    ],
)
def test_nothing_is_trained_with_what_is_no_hyperparameter(
    trial: Trial, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(trial.hyperparameters, **change)


@pytest.mark.parametrize("name", ["hash", "heldout_hash"])
def test_both_hashes_of_the_corpus_are_in_the_key(trial: Trial, name: str) -> None:
    corpus = dataclasses.replace(trial.corpus, **{name: "other"})
    assert dataclasses.replace(trial, corpus=corpus).key != trial.key


def test_names_are_not_in_the_key(trial: Trial) -> None:
    renamed = dataclasses.replace(
        trial,
        recipe=RecipeId(name="other", hash="other"),
        corpus=dataclasses.replace(trial.corpus, name="other", source=None),
    )
    assert renamed.key == trial.key


def test_a_new_field_at_its_default_keeps_old_keys(trial: Trial) -> None:
    extended = dataclasses.make_dataclass(
        "Extended", [("later", int, dataclasses.field(default=3))], bases=(Trial,), frozen=True,
        kw_only=True,
    )  # fmt: skip
    values = {f.name: getattr(trial, f.name) for f in dataclasses.fields(trial)}
    assert extended(**values).key == trial.key
    assert extended(**values, later=4).key != trial.key


def test_keys_are_the_same_on_every_machine_and_version(trial: Trial) -> None:
    """A change of this key orphans every ledger that there is."""
    pinned = dataclasses.replace(
        trial,
        trainer_version=1,
        corpus=dataclasses.replace(trial.corpus, hash="a", heldout_hash="b"),
    )
    assert pinned.key == "4b4940343fad680b"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 26}, "no multiple of 4"), ({"depth": 0}, "depth is 0"), ({"width": -4}, "width")],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    good = {"width": 24, "depth": 2, "heads": 2, "vocabulary": 256, "context": 64}
    with pytest.raises(InputError, match=message):
        Shape(**{**good, **change})
