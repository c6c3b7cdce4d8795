"""The state of a training of `pretrain.py` as a file, and back.

The file begins with its hash, which torch does not check: a flipped bit of a weight would be
trained on. Reading it costs 0.7 s a GB, as much as torch's own reading does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.trial import Progress
from trainers.workspace import UnreadableError, verify

CHECKPOINT_VERSION = 3
"""Raise it whenever a checkpoint holds something else: older ones are then set aside."""
HASH = "sha256"
HASH_BYTES = 32

Tensors = Mapping[str, Tensor]
"""What a learner gathers: weights, moments and step count."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a training is, and how it came there."""

    position: int
    """Steps that the model has seen."""
    decaying_to: int | None
    """The horizon of the branch that this is, steps; None on the trunk."""
    total: float
    """Sum of the training losses since the last point of the curve, of all ranks."""
    curve: tuple[Progress, ...]


@dataclass(frozen=True, kw_only=True)
class State:
    """All of a training but its tensors, of which there are some for each place."""

    here: Place
    trunk: Place | None
    """Within a branch: where it left the trunk."""
    done: int
    """Steps done for the trial, those of branches included."""
    told: tuple[int, float, float]
    """At the last horizon that was measured: steps done, seconds, seconds of training."""
    ahead: tuple[int, ...]
    """Horizons that were then still to be measured, tokens."""
    seconds: float
    training_seconds: float


def write_state(state: State, tensors: Mapping[str, Tensors], path: Path, *, key: str) -> None:
    """Write the state of the trial `key`, and the tensors of each place by its name in `State`.

    Raises
    ------
    OSError
        If the file system does not take it.
    """
    content = {
        "version": CHECKPOINT_VERSION,
        "key": key,
        "state": state_to_dict(state),
        "tensors": dict(tensors),
    }
    with path.open("w+b") as file:
        file.write(bytes(HASH_BYTES))
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Torch's own error hides what the file system said, such as that it is full.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        found = _hash(file)
        file.seek(0)
        file.write(found)


def read_state(path: Path, *, key: str) -> tuple[State, dict[str, Tensors]]:
    """What `write_state` wrote of the trial `key`.

    Raises
    ------
    UnreadableError
        If the file is damaged, of another trial or of another version.
    OSError, MemoryError
        If it cannot be read here and now, which says nothing of the file.
    """
    with path.open("rb") as file:
        if file.read(HASH_BYTES) != _hash(file):
            raise UnreadableError("it is damaged: its content has another hash than it had")
        file.seek(HASH_BYTES)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises anything, depending on the bytes
            if "can't allocate memory" in str(error):  # torch has no type for it
                raise MemoryError(str(error)) from error
            reason = str(error).partition(". ")[0].partition("\n")[0]
            raise UnreadableError(
                f"torch cannot read it ({type(error).__name__}: {reason})"
            ) from error
    found = verify(content, key=key, version=CHECKPOINT_VERSION)
    return state_from_dict(found["state"]), found["tensors"]


def state_to_dict(state: State) -> dict[str, Any]:
    """Return a state as numbers and texts, which JSON can carry."""
    return dataclasses.asdict(state)


def state_from_dict(data: Mapping[str, Any]) -> State:
    """Return the state that `state_to_dict` made `data` of, though JSON made lists of tuples."""
    trunk = data["trunk"]
    places = {"here": _place(data["here"]), "trunk": trunk and _place(trunk)}
    numbers = {name: tuple(data[name]) for name in ("told", "ahead")}
    return State(**{**data, **places, **numbers})


def _place(data: dict[str, Any]) -> Place:
    return Place(**{**data, "curve": tuple(Progress(**point) for point in data["curve"])})


def _hash(file: BufferedReader | BufferedRandom) -> bytes:
    """Of all that a file has behind its hash."""
    file.seek(HASH_BYTES)
    return hashlib.file_digest(file, HASH).digest()
