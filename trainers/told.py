"""What a training program tells: JSON lines, each a progress, a checkpoint or the result.

A line is one of these if it is an object with the key `train_loss`, `heldout_loss`, `checkpoint` or
`loss`; then it must be exactly that. Every other line is log, and so is a loss without a step among
keys that are not ours: that is some other logger's.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from analysis.errors import InputError

SHOWN = 200
"""Characters of a wrong line that an error shows."""

_Count = Annotated[int, Field(gt=0)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CommandError(Exception):
    """A training program did not do what it should."""


class ProtocolError(CommandError, InputError):
    """A training program told something that cannot be right, or no result.

    It would tell the same at the next attempt, wherever that runs.
    """


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Point(_Told):
    """A progress line; without `train_loss` it is an evaluation."""

    step: Annotated[int, Field(ge=0)]
    """Optimiser steps done, counted from the trial's beginning."""
    train_loss: float | None = None
    """Nats/token; NaN or infinite ends the trial as diverged."""
    tokens: Annotated[int, Field(ge=0)] | None = None
    """Trained on so far; by default as in an earlier line of the step, or step x batch_tokens."""
    heldout_loss: float | None = None
    """Nats/token; by default what an earlier line of the step has."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> Point:
        if self.train_loss is None and "train_loss" in self.model_fields_set:
            raise ValueError("its train_loss is null: leave it out, or give NaN if it diverged")
        if self.train_loss is None and self.heldout_loss is None:
            raise ValueError("its heldout_loss is null, and it has no train_loss")
        return self


class Saved(_Told):
    """A checkpoint line: what lies in the checkpoint directory now is whole."""

    checkpoint: _Count
    """The step after which the state was written."""


class Result(_Told):
    """The result line."""

    loss: float | None
    """Held-out loss, nats/token; NaN, infinite or null if diverged."""
    loss_stderr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Its standard error, nats/token."""
    tokens: _Count | None = None
    """Trained on in all; by default as many as the trial has, if progress came to its last step."""
    params_non_embedding: _Count | None = None
    params_matmul: _Count | None = None
    params_total: _Count | None = None
    """Parameters: without embeddings; with the output head; with the embedding too."""
    flops: _Positive | None = None
    """Exact training FLOPs."""
    bits_per_byte: _Positive | None = None
    """The held-out loss in bits per byte of text."""
    status: Literal["complete", "diverged"] = "complete"
    """Whether the training went well."""
    reason: str | None = None
    """Why it diverged."""
    device: str | None = None
    """What it ran on, as torch.cuda.get_device_name has it."""

    @model_validator(mode="after")
    def _is_a_loss(self) -> Result:
        if self.loss is None and self.status == "complete":
            raise ValueError("its loss is null, but its status is not diverged")
        if self.loss is not None and self.loss <= 0:
            raise ValueError(f"its loss is {self.loss:g}, but nats/token are above 0")
        return self


_MARKS: dict[str, type[Point | Saved | Result]] = {
    "train_loss": Point,
    "heldout_loss": Point,
    "checkpoint": Saved,
    "loss": Result,
}


def heard(text: str) -> Point | Saved | Result | None:
    """What a line tells; None where it is log.

    Raises
    ------
    ProtocolError
        If it is meant to tell something, and has other keys or values than that has.

    Examples
    --------
    >>> heard('{"step": 10, "train_loss": 2.5}').step, heard("iter 10: loss 2.5")
    (10, None)
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    mark = next((mark for mark in _MARKS if mark in data), None)
    if mark is None:
        return None
    if (
        _MARKS[mark] is Point
        and "step" not in data
        and not data.keys() <= Point.model_fields.keys()
    ):
        return None
    try:
        return _MARKS[mark].model_validate(data)
    except ValidationError as error:
        kind = _MARKS[mark]
        raise ProtocolError(
            f"the line {text[:SHOWN]!r} is no {_NAMES[kind]}: {_sentence(error, kind)}"
        ) from error


_NAMES = {Point: "progress", Saved: "checkpoint", Result: "result"}


def _sentence(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"it has the key {name!r}; there are {', '.join(kind.model_fields)}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"the key {name!r} is missing"
    _, wanted = str(first["msg"]).split(" ", 1)  # "Input"
    return f"{name} is {first['input']!r}, but it {wanted}"
