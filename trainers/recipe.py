"""What a recipe is: rules from (shape, D) to every hyperparameter of a training run.

A recipe's rules are data, so that two recipes of one name but other constants are told apart. Those
with a name are in `trainers.recipes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from trainers.shape import Architecture, Shape
from trainers.trial import Hyperparameters, Probe, Trial

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
DecayShare = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
"""Ranges of constants, which `recipe` in a sweep file is held to."""


class Recipe(Protocol):
    """A frozen dataclass: rules from a shape and a wished-for D to a run of whole steps.

    Its fields enter the identity of what is trained, so its rules must depend on nothing else.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def min_steps(self) -> int:
        """Least optimiser steps of a run."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The kind of decoder that its rules are for."""
        ...

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """Hyperparameters of a run of about `tokens` tokens, at least `min_steps` steps."""
        ...

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """Why its source says little of such a run, in half a sentence; None within its range."""
        ...


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Constants of a recipe that change nothing beside its other constants."""

    names: tuple[str, ...]
    """Names of the constants without effect, as a sweep file gives them."""
    because: str
    """Reason why they have no effect, as the end of a sentence."""


def idle(recipe: Recipe) -> dict[str, Idle]:
    """Return the constants of a recipe that change nothing, by name.

    A recipe says so in its property `idle`, which a person's own recipe need not have.
    """
    groups: Iterable[Idle] = (*getattr(recipe, "idle", ()), *_idle_parts(recipe.architecture))
    return {name: group for group in groups for name in group.names}


def _idle_parts(architecture: Architecture) -> Iterator[Idle]:
    if architecture.input_std is not None:
        because = "architecture.input_std says how those matrices start"
        yield Idle(names=("architecture.input_gain",), because=because)
    if architecture.tied:
        because = "architecture.tied makes the embedding the head"
        yield Idle(names=("architecture.head_std",), because=because)


def batch_and_steps(
    wanted: float, tokens: float, least_steps: int, shape: Shape
) -> tuple[int, int]:
    """Whole sequences near `wanted` tokens a step, and steps of them closest to `tokens`.

    No larger than leaves the least steps: where D is short these would exceed it otherwise.
    """
    most = max(1, int(tokens / least_steps // shape.context)) * shape.context
    batch = min(whole_sequences(wanted, shape), most)
    return batch, max(least_steps, round(tokens / batch))


def whole_sequences(tokens: float, shape: Shape) -> int:
    """The nearest batch of whole sequences, tokens; at least one."""
    return max(1, round(tokens / shape.context)) * shape.context


def probed(trial: Trial, probe: Probe, recipe: Recipe) -> Trial:
    """A trial of one horizon, trained at other rates or another batch than its recipe's.

    On the same tokens to within a step, and with as many of them in warm-up. What goes with the
    batch or the rate is what the recipe has there: AdamW's beta2 and decay, the rate at the end.
    """
    h = trial.hyperparameters
    # A person's own recipe need not have such rules.
    beta2 = getattr(recipe, "second_beta", lambda batch: h.beta2)
    decay = getattr(recipe, "weight_decay_at", lambda peak: h.weight_decay)
    last = getattr(recipe, "final_fraction_at", lambda peak: h.final_fraction)
    peak, same = probe.rate * h.matrix_rate, probe.rate == 1.0
    batch = whole_sequences(probe.batch * h.batch_tokens, trial.shape)
    if probe.batch == 1.0:
        batch = h.batch_tokens
    over = h.batch_tokens / batch
    steps = max(1, round(h.steps * over))
    other = replace(
        h,
        steps=steps,
        batch_tokens=batch,
        warmup_steps=min(steps, max(1, round(h.warmup_steps * over))),
        beta2=beta2(batch) if batch != h.batch_tokens else h.beta2,
        weight_decay=h.weight_decay if same else decay(peak),
        final_fraction=h.final_fraction if same or h.schedule == "wsd" else last(peak),
        matrix_rate=peak,
        embedding_rate=probe.rate * h.embedding_rate,
        head_rate=probe.rate * h.head_rate,
    )
    horizons = tuple(max(1, round(tokens / batch)) * batch for tokens in trial.horizons)
    return replace(trial, hyperparameters=other, horizons=horizons, probe=probe)


def outside(who: str, **given: tuple[float, float, float]) -> str | None:
    """Which of the quantities, each with its range, are outside of it."""
    out = [
        f"{name} {low:.0e} to {high:.0e}"
        for name, (value, low, high) in given.items()
        if not low <= value <= high
    ]
    return f"{who} at {' and '.join(out)}" if out else None
