"""The named recipes, each with its source, its N convention and its range.

Own ones: `named("my_module:MyRecipe")`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from analysis.errors import InputError
from trainers.flops import params
from trainers.published import DeepSeek, LlamaAdamW, Muon, MuP, StepLaw
from trainers.recipe import (
    Count,
    Idle,
    Momentum,
    Positive,
    Recipe,
    Share,
    batch_and_steps,
    idle,
    outside,
)
from trainers.shape import Architecture, Shape
from trainers.trial import Hyperparameters, RecipeId


@dataclass(frozen=True, kw_only=True)
class MiniRecipe:
    """Byte-level models of 1e3 to 4e5 parameters at depth 2, on one CPU core, in seconds.

    Tuned at widths 16 to 64 and budgets of 4e10 to 1e12 FLOPs, context 64; outside of that it is
    an extrapolation. Short runs want a higher rate; no dependence on width was found.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    batch_coefficient: Positive = 0.45
    """Tokens a step = this x sqrt(D), in whole sequences, not rounded to powers of two: that
    leaves a sawtooth in the valleys."""
    matrix_rate: Positive = 0.014
    embedding_rate: Positive = 0.05
    head_rate: Positive = 0.5
    """Over the width."""
    adamw_rate: Positive = 0.384
    """Over the width, for every parameter, with `adamw`."""
    rate_factor: Positive = 1.05
    short_run_tokens: Positive = 6e5
    short_run_exponent: float = 0.4
    """Muon's rates are times `rate_factor` x max(1, (short_run_tokens/D)^short_run_exponent)."""
    warmup_fraction: Share = 0.1
    min_warmup_steps: Count = 10
    min_steps: Count = 20
    final_fraction: Share = 0.1
    beta1: Momentum = 0.9
    beta2: Momentum = 0.97
    epsilon: Positive = 1e-9
    clip: Positive = 1.0

    @property
    def architecture(self) -> Architecture:
        """See `Recipe.architecture`."""
        return Architecture()

    @property
    def idle(self) -> tuple[Idle, ...]:
        """See `trainers.recipe.idle`."""
        if self.optimizer == "muon":
            because = "its optimizer is muon, whose rates are matrix_rate and two others"
            return (Idle(names=("adamw_rate",), because=because),)
        names = ("matrix_rate", "embedding_rate", "head_rate", "rate_factor")
        short = ("short_run_tokens", "short_run_exponent")
        because = "its optimizer is adamw, whose rate is adamw_rate over the width"
        return (Idle(names=(*names, *short), because=because),)

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """See `Recipe.resolve`."""
        wanted = self.batch_coefficient * math.sqrt(tokens)
        batch, steps = batch_and_steps(wanted, tokens, self.min_steps, shape)
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

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        n = params(shape).non_embedding
        return outside("mini was tuned", N=(n, 1e3, 4e5), D=(tokens, 5e4, 1e7))


RECIPES: dict[str, Recipe] = {
    "mini": MiniRecipe(),
    "mini-adamw": MiniRecipe(optimizer="adamw"),
    "llama-adamw": LlamaAdamW(),
    "step-law": StepLaw(),
    "deepseek": DeepSeek(),
    "mup": MuP(),
    "muon": Muon(),
}


def named(name: str, constants: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name, or a person's own as `module:Class`; some constants may be others.

    Raises
    ------
    InputError
        If there is none of that name, it has no such constant, or a constant of the wrong kind.
    """
    known = RECIPES.get(name) or _own(name)
    recipe: Recipe = _changed(f"recipe {name}", known, constants or {})
    return recipe


def constants_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of a recipe's constants that change what it trains, sorted.

    Those of its architecture are written with a dot, as in `architecture.norm`.
    """
    constants = _names(dataclasses.asdict(recipe))
    return tuple(sorted({*constants} - {*idle(recipe), *getattr(recipe, "fixed", ())}))


def require_effect(name: str, constants: Mapping[str, Any]) -> None:
    """Refuse constants that change nothing in the recipe that they make.

    Raises
    ------
    InputError
        If a constant has no effect. It names those that have one.
    """
    recipe = named(name, constants)
    without = idle(recipe)
    for constant in _names(constants):
        if constant in without:
            raise InputError(
                f"recipe {name} does not use {constant}: {without[constant].because}; leave it "
                f"out. Its constants are {', '.join(constants_of(recipe))}"
            )


def _names(constants: Mapping[str, Any]) -> Iterator[str]:
    """Names of given constants, those in tables with a dot."""
    for name, value in constants.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{part}" for part in value)
        else:
            yield name


def _changed(what: str, values: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass with other values, those of nested ones as tables."""
    known = {item.name: getattr(values, item.name) for item in dataclasses.fields(values)}
    for name in given:
        if name not in known:
            names = constants_of(values) if hasattr(values, "resolve") else sorted(known)
            raise InputError(f"{what} has no {name!r}; it has {', '.join(names)}")
        if dataclasses.is_dataclass(known[name]) and not isinstance(given[name], Mapping):
            raise InputError(f"{name} is {given[name]!r}, but it should be a table")
    other = {
        name: _changed(name, known[name], value) if isinstance(value, Mapping) else value
        for name, value in given.items()
    }
    return dataclasses.replace(values, **other)


def _own(name: str) -> Recipe:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(
            f"no recipe is called {name!r}; there are {', '.join(RECIPES)}, or give your own as "
            "'module:Class'"
        )
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"recipe {name!r} cannot be made: {error}") from error
    # Nothing else is called: it may be any function of any module.
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise InputError(f"recipe {name!r} lacks being a dataclass: see trainers.recipe.Recipe")
    try:
        recipe = kind()
    except TypeError as error:
        raise InputError(f"recipe {name!r} cannot be made: {error}") from error
    missing = [
        part for part in ("architecture", "min_steps", "resolve") if not hasattr(recipe, part)
    ]
    if missing:
        raise InputError(
            f"recipe {name!r} lacks {' and '.join(missing)}: see trainers.recipe.Recipe"
        )
    return recipe  # type: ignore[return-value] # as far as can be seen from outside


def identity(name: str, recipe: Recipe) -> RecipeId:
    """Name and hash of the rules of a recipe."""
    rules = {"class": type(recipe).__name__, **dataclasses.asdict(recipe)}
    text = json.dumps(rules, sort_keys=True)
    return RecipeId(name=name, hash=hashlib.sha256(text.encode()).hexdigest()[:16])
