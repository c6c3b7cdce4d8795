"""What is trained and what comes back: shapes, trials, measurements, and the trainers' seam.

Values only. A trial is immutable and named by the hash of its content, so that equal content has
equal keys on every machine, and a new field with a default leaves old keys as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from analysis.errors import InputError
from trainers.corpus import CorpusSource, source_from_dict
from trainers.workspace import Workspace

_NOT_IN_KEY = {"key": False}
KEY_LENGTH = 16
"""Hexadecimal digits of a key: 64 bits, a collision among 1e6 trials has odds of 3e-8."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Width, depth, heads, vocabulary and context length of one decoder-only transformer."""

    width: int
    """d_model, units; a multiple of twice `heads`, since rotary embeddings turn pairs."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    vocabulary: int
    """Symbols."""
    context: int
    """Context length, tokens."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"a shape's {name} is {value}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise InputError(
                f"width {self.width} is no multiple of {2 * self.heads} (2 x {self.heads} heads): "
                "choose another width or number of heads"
            )


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Everything that a recipe decides for one (shape, D). All of it enters the trial's key."""

    steps: int
    """Optimiser steps."""
    batch_tokens: int
    """Tokens a step, a multiple of the context length."""
    optimizer: Literal["muon", "adamw"]
    """`muon` trains block matrices with Muon, embedding and head with AdamW; `adamw` all."""
    matrix_rate: float
    """Peak learning rate of the block matrices."""
    embedding_rate: float
    """Peak learning rate of the embedding."""
    head_rate: float
    """Peak learning rate of the output head."""
    warmup_steps: int
    """Steps of linear warm-up."""
    final_fraction: float
    """Learning rate at the horizon over its peak."""
    beta1: float
    beta2: float
    epsilon: float
    """AdamW's betas and epsilon."""
    weight_decay: float
    """AdamW's decoupled decay, times the learning rate, a step."""
    clip: float
    """Bound on the global gradient norm."""
    schedule: str = "cosine"
    """Name of the learning-rate schedule."""


@dataclass(frozen=True, kw_only=True)
class CorpusId:
    """Which tokens a trial sees: hashes that enter the key, and the source to load them from."""

    name: str = field(metadata=_NOT_IN_KEY)
    hash: str
    """Hash of the training tokens."""
    heldout_hash: str
    """Hash of the held-out tokens."""
    train_tokens: int = field(metadata=_NOT_IN_KEY)
    """Tokens in one pass."""
    source: CorpusSource | None = field(metadata=_NOT_IN_KEY)
    """Where to load them; None for trainers that need no text."""

    @property
    def combined_hash(self) -> str:
        """One hash for both parts, as stored in the ledger."""
        return _digest([self.hash, self.heldout_hash])


@dataclass(frozen=True, kw_only=True)
class RecipeId:
    """Which recipe resolved a trial's hyperparameters. For people and for kinds, not for keys."""

    name: str
    hash: str
    """Hash of the recipe's rules."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model to be trained. Same content, same key, same result."""

    trainer: str
    """Name in `trainers.registry`."""
    trainer_version: int
    """Version of the trainer's results, from `trainers.registry`."""
    shape: Shape
    hyperparameters: Hyperparameters
    corpus: CorpusId
    recipe: RecipeId = field(metadata=_NOT_IN_KEY)
    seed: int
    settings: tuple[tuple[str, float], ...] = ()
    """What only this trainer understands, sorted by name."""

    @property
    def tokens(self) -> int:
        """The horizon D in tokens: a cosine trial has one, part of its key."""
        return self.hyperparameters.steps * self.hyperparameters.batch_tokens

    @cached_property
    def key(self) -> str:
        """Hash of the resolved content; fields at their default and names are left out."""
        return _digest(_content(self))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Trial:
        """Build a trial from what `to_dict` gave, also after a round trip through JSON."""
        corpus = data["corpus"]
        source = corpus["source"]
        return Trial(
            **{
                **data,
                "shape": Shape(**data["shape"]),
                "hyperparameters": Hyperparameters(**data["hyperparameters"]),
                "recipe": RecipeId(**data["recipe"]),
                "corpus": CorpusId(**{**corpus, "source": source and source_from_dict(source)}),
                "settings": tuple((name, value) for name, value in data["settings"]),
            }
        )


def _content(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    return {
        item.name: _content(getattr(value, item.name))
        for item in dataclasses.fields(value)
        if item.metadata.get("key", True) and getattr(value, item.name) != item.default
    }


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class Step:
    """A trial has done an optimiser step, and the checkpoint that was due after it is written."""

    step: int
    """From 1; counted from the trial's beginning, whatever attempt did it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a trial is: one point of its loss curve."""

    step: int
    tokens: int
    flops: float
    """Exact training FLOPs so far."""
    train_loss: float
    """Mean over the steps since the last point, nats/token."""
    heldout_loss: float | None = None
    """On a fixed part of the held-out set, nats/token; None where it was not evaluated."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a trial gave at its horizon."""

    tokens: int
    status: Literal["complete", "diverged"]
    reason: str | None
    """Why it diverged."""
    loss: float | None
    """Held-out loss, nats/token; None when it is not finite."""
    loss_stderr: float | None
    """Its standard error, nats/token, clustered by held-out segment."""
    bits_per_byte: float | None
    seconds: float
    """Wall time, training and evaluation, of all attempts up to their checkpoints."""
    mfu: float | None
    """Exact training FLOPs over seconds of training and the device's measured peak."""
    device: str
    curve: tuple[Progress, ...]
    versions: dict[str, str]
    """Python and library versions."""
    steps: int = 0
    """Optimiser steps that this attempt did itself."""
    resumed_from: int = 0
    """The step of the checkpoint that this attempt started from; 0 without one."""


Event = Step | Progress | Measurement


class Trainer(Protocol):
    """The seam between what is trained and what schedules it.

    `train` is a generator. It yields `Step` after every optimiser step (a trainer that cannot, or
    whose steps take microseconds, after a few), `Progress` as it goes, before the step's `Step`,
    and ends with one `Measurement` a horizon.

    Promises: the result depends on the trial's content alone, and on one CPU thread bit for bit; a
    diverged training is a `Measurement` with that status, never an exception; an exception means
    that this attempt failed and that another may succeed. The caller may stop iterating at any
    time, and the process may die at any time.

    Checkpoints: a trainer starts from the newest one in `workspace` that it can read, and saves
    one wherever `workspace.due(step)` says so, after the step and before it yields its `Step`. The
    result, with its whole curve, is the same as without any; `Progress` before the checkpoint is
    not yielded again. What is due at a step that ends the training as diverged may be left out:
    the measurement follows at once.

    On several ranks (`RANK` and `WORLD_SIZE` in the environment, see `cluster.gang`) each runs
    `train`; the first one's events count, and it alone saves.
    """

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        """Train `trial` to its horizon."""
        ...
