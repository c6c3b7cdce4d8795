"""Recipes: named, frozen rules from (shape, D) to every hyperparameter of a training run.

A recipe's rules are data, so that two recipes of one name but other constants are told apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from analysis.errors import InputError
from trainers.flops import params
from trainers.trial import Hyperparameters, RecipeId, Shape


class Recipe(Protocol):
    """A frozen dataclass: rules from a shape and a wished-for D to a run of whole steps."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def min_steps(self) -> int:
        """Least optimiser steps of a run."""
        ...

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """Hyperparameters of a run of about `tokens` tokens, at least `min_steps` steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class MiniRecipe:
    """Byte-level models of 1e3 to 4e5 parameters at depth 2, on one CPU core, in seconds.

    Tuned at widths 16 to 64 and budgets of 4e10 to 1e12 FLOPs, context 64; outside of that it is
    an extrapolation. Short runs want a higher rate; no dependence on width was found.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    batch_coefficient: float = 0.45
    """Tokens a step = this x sqrt(D), in whole sequences, not rounded to powers of two: that
    leaves a sawtooth in the valleys."""
    matrix_rate: float = 0.014
    embedding_rate: float = 0.05
    head_rate: float = 0.5
    """Over the width."""
    adamw_rate: float = 0.384
    """Over the width, for every parameter, with `adamw`."""
    rate_factor: float = 1.05
    short_run_tokens: float = 6e5
    short_run_exponent: float = 0.4
    """Muon's rates are times `rate_factor` x max(1, (short_run_tokens/D)^short_run_exponent)."""
    warmup_fraction: float = 0.1
    min_warmup_steps: int = 10
    min_steps: int = 20
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.97
    epsilon: float = 1e-9
    clip: float = 1.0

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """See `Recipe.resolve`."""
        batch = _whole_sequences(self.batch_coefficient * math.sqrt(tokens), shape)
        steps = max(self.min_steps, round(tokens / batch))
        if self.optimizer == "muon":
            short = max(1.0, (self.short_run_tokens / (steps * batch)) ** self.short_run_exponent)
            factor = self.rate_factor * short
            matrix, embedding = self.matrix_rate * factor, self.embedding_rate * factor
            head = self.head_rate / shape.width * factor
        else:
            matrix = embedding = head = self.adamw_rate / shape.width
        return Hyperparameters(
            steps=steps,
            batch_tokens=batch,
            optimizer=self.optimizer,
            matrix_rate=matrix,
            embedding_rate=embedding,
            head_rate=head,
            warmup_steps=max(self.min_warmup_steps, int(self.warmup_fraction * steps)),
            final_fraction=self.final_fraction,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            weight_decay=0.0,
            clip=self.clip,
        )


@dataclass(frozen=True, kw_only=True)
class LadderRecipe:
    """AdamW with batch and rate by model size: Porian et al. (2024, arXiv 2406.19146).

    N is non-embedding. Rate 0.0047 (N/108e6)^(-1/3), batch 160 x 2048 (N/108e6)^(2/3) tokens,
    warm-up over N tokens, beta2 0.95 from batches of 524,288 tokens on, else 0.99. Fitted there
    at 5e6 to 9e8 parameters; smaller models are an extrapolation.
    """

    reference_params: float = 108e6
    reference_rate: float = 0.0047
    rate_exponent: float = -1 / 3
    reference_batch_tokens: float = 160 * 2048
    batch_exponent: float = 2 / 3
    large_batch_tokens: int = 524_288
    max_warmup_fraction: float = 0.25
    """Runs shorter than 4 N tokens would otherwise hardly leave the warm-up."""
    min_steps: int = 20
    final_fraction: float = 0.1
    beta1: float = 0.9
    epsilon: float = 1e-8
    clip: float = 1.0

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """See `Recipe.resolve`."""
        n = params(shape).non_embedding
        ratio = n / self.reference_params
        batch = _whole_sequences(self.reference_batch_tokens * ratio**self.batch_exponent, shape)
        batch = min(batch, _whole_sequences(tokens / self.min_steps, shape))
        steps = max(self.min_steps, round(tokens / batch))
        rate = self.reference_rate * ratio**self.rate_exponent
        return Hyperparameters(
            steps=steps,
            batch_tokens=batch,
            optimizer="adamw",
            matrix_rate=rate,
            embedding_rate=rate,
            head_rate=rate,
            warmup_steps=max(1, min(round(n / batch), int(self.max_warmup_fraction * steps))),
            final_fraction=self.final_fraction,
            beta1=self.beta1,
            beta2=0.95 if batch >= self.large_batch_tokens else 0.99,
            epsilon=self.epsilon,
            weight_decay=0.0,
            clip=self.clip,
        )


RECIPES: dict[str, Recipe] = {
    "mini": MiniRecipe(),
    "mini-adamw": MiniRecipe(optimizer="adamw"),
    "ladder-adamw": LadderRecipe(),
}


def named(name: str) -> Recipe:
    """Look up a recipe.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def identity(name: str) -> RecipeId:
    """Name and hash of the rules of a recipe."""
    recipe = named(name)
    rules = {"class": type(recipe).__name__, **dataclasses.asdict(recipe)}
    text = json.dumps(rules, sort_keys=True)
    return RecipeId(name=name, hash=hashlib.sha256(text.encode()).hexdigest()[:16])


def _whole_sequences(tokens: float, shape: Shape) -> int:
    return max(1, round(tokens / shape.context)) * shape.context
