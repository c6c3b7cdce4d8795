"""Trials of the user's own program, with real processes, and what becomes of them."""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.command import Commanded
from trainers.template import Command, file_hash
from trainers.told import CommandError
from trainers.trial import Measurement, Trial
from trainers.workspace import Scratch

MakeCommand = Callable[..., Trial]
RESULT = '{"loss": 3.0, "tokens": 25600}'
"""What a program may say at the end of such a trial."""


def commanded_trial(
    like: Trial, place: Path, program: str, *arguments: str, **changes: object
) -> Trial:
    """A trial of 100 steps whose command is a Python program, with arguments in `sys.argv`."""
    (place / "train.py").write_text(textwrap.dedent(program))
    command = Command(
        run=("{python}", "train.py", *arguments),
        files=(("train.py", file_hash(place / "train.py")),),
        directory=str(place),
    )
    return dataclasses.replace(
        like,
        hyperparameters=dataclasses.replace(like.hyperparameters, steps=100),
        trainer="command",
        command=dataclasses.replace(command, **changes),
    )


def measure(trial: Trial, workspace: Scratch) -> Measurement:
    """What the trial comes to."""
    *_, last = Commanded().train(trial, workspace)
    assert isinstance(last, Measurement)
    return last


def failure(trial: Trial, workspace: Scratch) -> str:
    """Why the attempt fails."""
    with pytest.raises(CommandError) as caught:
        list(Commanded().train(trial, workspace))
    return str(caught.value)


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
