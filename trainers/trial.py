"""What is trained and what comes back: trials, measurements, and the trainers' seam.

Values only. A trial is immutable and named by the hash of its content, so that equal content has
equal keys on every machine, and a new field with a default leaves old keys as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from analysis.errors import InputError
from trainers.corpus import CorpusSource, source_from_dict
from trainers.schedule import LEAST_DECAY, decay_steps
from trainers.shape import Shape, shape_from_dict
from trainers.template import Command
from trainers.workspace import Workspace

Precision = Literal["fp32", "bf16"]
"""Of products and activations; weights, gradients and optimiser are always fp32."""

_BOUNDS: Sequence[tuple[str, tuple[str, ...], Callable[[float], bool]]] = (
    ("at least 1", ("steps", "batch_tokens", "warmup_steps"), lambda value: value >= 1),
    (
        "finite and above 0",
        ("matrix_rate", "embedding_rate", "head_rate", "epsilon", "clip"),
        lambda value: value > 0,
    ),
    ("from 0 to below 1", ("beta1", "beta2", "momentum"), lambda value: 0 <= value < 1),
    ("from 0 to 1", ("final_fraction", "decay_fraction"), lambda value: 0 <= value <= 1),
    ("finite and at least 0", ("weight_decay",), lambda value: value >= 0),
)
"""What hyperparameters are within, whatever recipe made them."""
_NOT_IN_KEY = {"key": False}
KEY_LENGTH = 16
"""Hexadecimal digits of a key: 64 bits, a collision among 1e6 trials has odds of 3e-8."""


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
    """Name of the learning-rate schedule, of `trainers.schedule`."""
    decay_fraction: float = 0.0
    """Share of a horizon over which `wsd` decays."""
    precision: Precision = "fp32"
    momentum: float = 0.9
    """Muon's."""

    def __post_init__(self) -> None:
        for wanted, names, holds in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                if not (math.isfinite(value) and holds(value)):
                    raise InputError(
                        f"{name} is {value:g}, but it should be {wanted}: change the constants "
                        "that make it"
                    )


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
class Probe:
    """That a trial departs from its recipe, and how far: for no fit, but to see what is better."""

    rate: float = 1.0
    """Its peak rates over the recipe's."""
    batch: float = 1.0
    """Its batch over the recipe's, before it is rounded to whole sequences."""


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
    command: Command | None = None
    """The program that trains it, where the trainer is `command`."""
    probe: Probe | None = None
    """In the key: so that nobody's grid takes a probe's row for one of its own."""
    deterministic: bool = field(default=False, metadata=_NOT_IN_KEY)
    """Whether GPUs compute only what they compute again to the bit. Another rounding, no other
    trial."""
    horizons: tuple[int, ...] = field(default=(), metadata=_NOT_IN_KEY)
    """Of a trunk (schedule `wsd`): where it is measured, tokens, ascending. A trunk can be extended
    by further ones. Its hyperparameters' steps are what set its batch and rates."""

    def __post_init__(self) -> None:
        h, before = self.hyperparameters, 0
        if self.horizons and h.schedule != "wsd":
            raise InputError(
                f"horizons are for the schedule wsd, and this one is {h.schedule}: leave them out"
            )
        for tokens in self.horizons:
            if tokens <= before:
                raise InputError(f"horizon {tokens:,} follows {before:,}: they must ascend")
            if tokens % h.batch_tokens:
                raise InputError(
                    f"horizon {tokens:,} is no multiple of the batch of {h.batch_tokens:,} tokens"
                )
            start = self.decay_start(tokens)
            if start < h.warmup_steps:
                raise InputError(
                    f"horizon {tokens:,}: its decay would begin at step {start}, within the "
                    f"{h.warmup_steps} steps of warm-up: give a longer horizon or a smaller "
                    "decay_fraction"
                )
            if tokens // h.batch_tokens - start < LEAST_DECAY:
                raise InputError(
                    f"horizon {tokens:,} is {tokens // h.batch_tokens} steps, and its decay would "
                    "be one of them, at the full rate: give a longer horizon, a smaller batch or "
                    "a larger decay_fraction"
                )
            before = tokens

    @property
    def measured_at(self) -> tuple[int, ...]:
        """Every horizon D, tokens. A cosine trial has one, part of its key."""
        h = self.hyperparameters
        return self.horizons or (h.steps * h.batch_tokens,)

    @property
    def tokens(self) -> int:
        """The last horizon, tokens."""
        return self.measured_at[-1]

    def decay_start(self, tokens: int) -> int:
        """The step of the trunk at which the branch to a horizon leaves it."""
        h = self.hyperparameters
        steps = tokens // h.batch_tokens
        return steps - decay_steps(steps, h.decay_fraction)

    def only(self, horizons: Collection[int]) -> Trial:
        """The same, to be measured at these of its horizons alone."""
        kept = tuple(tokens for tokens in self.horizons if tokens in horizons)
        return dataclasses.replace(self, horizons=kept)

    @property
    def marginal_steps(self) -> dict[int, int]:
        """Optimiser steps that each horizon takes beyond those before it: trunk, then branch."""
        h, left = self.hyperparameters, 0
        if h.schedule != "wsd":
            return {self.tokens: h.steps}
        found = {}
        for tokens in self.measured_at:
            found[tokens] = tokens // h.batch_tokens - left
            left = self.decay_start(tokens)
        return found

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the trunk and all its branches."""
        return sum(self.marginal_steps.values())

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
        source, command, probe = corpus["source"], data.get("command"), data.get("probe")
        return Trial(
            **{
                **data,
                "shape": shape_from_dict(data["shape"]),
                "hyperparameters": Hyperparameters(**data["hyperparameters"]),
                "recipe": RecipeId(**data["recipe"]),
                "corpus": CorpusId(**{**corpus, "source": source and source_from_dict(source)}),
                "settings": tuple((name, value) for name, value in data["settings"]),
                "horizons": tuple(data["horizons"]),
                "command": command and Command.from_dict(command),
                "probe": probe and Probe(**probe),
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
    """From 1; counted from the trial's beginning, whatever attempt did it, branches included."""


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
class DomainLoss:
    """Loss on one of a corpus's further held-out sets."""

    name: str
    loss: float
    """nats/token."""
    loss_stderr: float | None
    """nats/token, clustered by document."""
    bits_per_byte: float | None


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
    """Wall time, training and evaluation without compiling, of all attempts up to their
    checkpoints; of a trunk, since its last horizon."""
    mfu: float | None
    """Exact training FLOPs over seconds of training and the device's peak, as
    `trainers.device.peak_flops` has it."""
    device: str
    curve: tuple[Progress, ...]
    versions: dict[str, str]
    """Python and library versions."""
    loss_step: int | None = None
    """The step after which the loss was measured, where that is not the last one."""
    steps: int = 0
    """Optimiser steps that this attempt did itself."""
    resumed_from: int = 0
    """The step of the checkpoint that this attempt started from; 0 without one."""
    domains: tuple[DomainLoss, ...] = ()
    """On the corpus's further held-out sets."""
    flops_spent: float | None = None
    """Marginal FLOPs, where they are not those of the curve: of a trunk, since its last horizon."""
    params: Mapping[str, int] | None = None
    """Parameters by convention (`trainers.flops.Params`), where they are not those of the shape."""
    flops: float | None = None
    """Exact training FLOPs, where they are not those of the shape and the tokens."""
    compile_seconds: float | None = None
    """Seconds that compiling took in this attempt, of a trunk since its last horizon; in neither
    `seconds` nor `mfu`. 0 where training was not compiled; None where nobody knows, or where it was
    compiled for an earlier horizon."""


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
