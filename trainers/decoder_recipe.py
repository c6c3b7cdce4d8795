"""What the recipes for larger models share, and where a person's own begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from analysis.errors import InputError
from trainers.decoders import LLAMA
from trainers.flops import params
from trainers.recipe import (
    Count,
    DecayShare,
    Idle,
    Momentum,
    NotNegative,
    Positive,
    Share,
    batch_and_steps,
)
from trainers.shape import Architecture, Shape
from trainers.trial import Hyperparameters, Precision


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a rule of a `DecoderRecipe` gives for one (shape, D)."""

    batch_tokens: float
    matrix: float
    embedding: float
    head: float


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """What the recipes for larger models share; a subclass gives `rates` and what it changes."""

    architecture: Architecture = LLAMA
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Whose rates its rules give: no other can be had by changing this alone."""
    precision: Precision = "bf16"
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`wsd`: warm-up, constant, then the last `decay_fraction` by 1 - sqrt (Hägele et al. 2024,
    arXiv 2405.18392); one run then has several horizons."""
    decay_fraction: DecayShare = 0.2
    """With `wsd`."""
    rate_factor: Positive = 1.0
    """Multiplies every rate; what `isoflop tune` finds."""
    batch_factor: Positive = 1.0
    """Multiplies the batch."""
    warmup_tokens_per_param: NotNegative = 1.0
    """Warm-up over this many tokens a parameter (`size`)..."""
    max_warmup_fraction: Share = 0.25
    """...but no more of a run: one shorter than 4 N tokens would hardly leave it."""
    trunk_warmup_fraction: Share = 0.02
    """The same of a trunk, whose shortest horizon may be a small part of what sets its batch."""
    min_steps: Count = 20
    final_fraction: Share = 0.1
    beta1: Momentum = 0.9
    beta2: Momentum = 0.95
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0
    momentum: Momentum = 0.95
    """Muon's."""

    final_rates: ClassVar[tuple[str, ...]] = ()
    """Further constants that decide the rate at a horizon."""
    ties: ClassVar[bool] = True
    """Whether the head may be the embedding: not where they start or train apart."""

    def __post_init__(self) -> None:
        whose = type(self).optimizer
        if self.optimizer != whose:
            raise InputError(
                f"optimizer is {self.optimizer!r}, but its rates are {whose}'s, and another's "
                f"differ several times: leave it out, or take a recipe for {self.optimizer}"
            )
        if self.architecture.tied and not self.ties:
            raise InputError(
                "architecture.tied is true, but it starts embedding and head apart and trains "
                "them at rates of their own: leave it out, or take llama-adamw"
            )

    @property
    def fixed(self) -> tuple[str, ...]:
        """Constants that a sweep file cannot change."""
        return ("optimizer",) if self.ties else ("optimizer", "architecture.tied")

    @property
    def idle(self) -> tuple[Idle, ...]:
        """See `trainers.recipe.idle`. Nothing is known of a subclass with its own `resolve`."""
        if type(self).resolve is not DecoderRecipe.resolve:
            return ()
        found = []
        if self.schedule == "wsd":
            names = ("final_fraction", "max_warmup_fraction", *self.final_rates)
            because = "wsd decays to zero, and its warm-up is bound by trunk_warmup_fraction"
            found.append(Idle(names=names, because=because))
        else:
            names = ("decay_fraction", "trunk_warmup_fraction")
            found.append(Idle(names=names, because='they are for schedule = "wsd"'))
        if self.optimizer != "muon":
            found.append(Idle(names=("momentum",), because="momentum is Muon's"))
        return tuple(found)

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """The rule: batch and rates of a run of `tokens` tokens."""
        raise NotImplementedError

    def size(self, shape: Shape) -> int:
        """N as its source counts it: by default without embedding and head."""
        return params(shape).non_embedding

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """See `Recipe.resolve`."""
        found = self.rates(shape, tokens)
        batch, steps = batch_and_steps(
            self.batch_factor * found.batch_tokens, tokens, self.min_steps, shape
        )
        warmup = round(self.warmup_tokens_per_param * self.size(shape) / batch)
        trunk = self.schedule == "wsd"
        longest = self.trunk_warmup_fraction if trunk else self.max_warmup_fraction
        peak = self.rate_factor * found.matrix
        return Hyperparameters(
            steps=steps,
            batch_tokens=batch,
            optimizer=self.optimizer,
            matrix_rate=peak,
            embedding_rate=self.rate_factor * found.embedding,
            head_rate=self.rate_factor * found.head,
            warmup_steps=max(1, min(warmup, int(longest * steps))),
            final_fraction=0.0 if trunk else self.final_fraction_at(peak),
            beta1=self.beta1,
            beta2=self.second_beta(batch),
            epsilon=self.epsilon,
            weight_decay=self.weight_decay_at(peak),
            clip=self.clip,
            schedule=self.schedule,
            decay_fraction=self.decay_fraction if trunk else 0.0,
            precision=self.precision,
            momentum=self.momentum if self.optimizer == "muon" else 0.9,
        )

    def second_beta(self, batch_tokens: int) -> float:
        """AdamW's beta2 at a batch."""
        return self.beta2

    def final_fraction_at(self, peak: float) -> float:
        """The rate at a horizon over its peak."""
        return self.final_fraction

    def weight_decay_at(self, peak: float) -> float:
        """AdamW's weight decay, which a step multiplies by its rate."""
        return self.weight_decay

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        return None
