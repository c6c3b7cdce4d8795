"""Trainers by name, imported only when asked for: torch takes seconds to import."""

from __future__ import annotations

from importlib import import_module

from trainers.trial import Trainer

TRAINERS = {
    "pretrain": "trainers.pretrain:Pretrain",
    "simulated": "trainers.simulated:Simulated",
    "command": "trainers.command:Commanded",
}

VERSIONS = {"pretrain": 2, "simulated": 1, "command": 1}
"""Raise one whenever a change of that trainer changes its results: old keys stay what they were."""


def trainer(name: str) -> Trainer:
    """Make the trainer called `name`, one of `TRAINERS`."""
    module, attribute = TRAINERS[name].split(":")
    made: Trainer = getattr(import_module(module), attribute)()
    return made


def trainer_version(name: str) -> int:
    """The version of a trainer's results, part of every key; known without importing torch."""
    return VERSIONS[name]
