"""Fitted laws of rate and batch as constants of a recipe, for those whose rules are such laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.errors import InputError
from analysis.tuning import PowerLaw
from trainers.flops import params
from trainers.published import DeepSeek, LlamaAdamW, StepLaw
from trainers.recipe import Recipe
from trainers.recipes import RECIPES
from trainers.shape import Shape

DIGITS = 5
"""Of a constant: more than any probe tells."""

VARIABLES: Mapping[str, Callable[[Shape, float], float]] = {
    "N": lambda shape, tokens: float(params(shape).non_embedding),
    "N+head": lambda shape, tokens: float(params(shape).matmul),
    "D": lambda shape, tokens: tokens,
    "C": lambda shape, tokens: DeepSeek().flops(shape, tokens),
}
"""What rules are laws in: parameters without embedding and head, those with the head, tokens,
FLOPs as DeepSeek counts them."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which constants of a recipe are those of a power law."""

    coefficient: str
    exponents: Mapping[str, str]
    """By variable."""
    reference: Mapping[str, str]
    """By variable, the constant that it is taken over."""

    def constants(self, recipe: Recipe, law: PowerLaw) -> dict[str, float]:
        """The constants that make a recipe's rule this law."""
        over = {name: getattr(recipe, field) for name, field in self.reference.items()}
        exponents = {
            field: _rounded(law.exponents[name].estimate) for name, field in self.exponents.items()
        }
        return {self.coefficient: _rounded(law.coefficient(**over)), **exponents}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rule(
    coefficient: str, exponents: Mapping[str, str], reference: Mapping[str, str] | None = None
) -> Rule:
    return Rule(coefficient=coefficient, exponents=exponents, reference=reference or {})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A recipe's two laws."""

    rate: Rule
    batch: Rule


_PORIAN = {"N+head": "reference_params"}
RULES: Mapping[type, Rules] = {
    LlamaAdamW: Rules(
        rate=_rule("reference_rate", {"N+head": "rate_exponent"}, _PORIAN),
        batch=_rule("reference_batch_tokens", {"N+head": "batch_exponent"}, _PORIAN),
    ),
    StepLaw: Rules(
        rate=_rule("rate_coefficient", {"N": "rate_params_exponent", "D": "rate_tokens_exponent"}),
        batch=_rule("batch_coefficient", {"D": "batch_tokens_exponent"}),
    ),
    DeepSeek: Rules(
        rate=_rule("rate_coefficient", {"C": "rate_exponent"}),
        batch=_rule("batch_coefficient", {"C": "batch_exponent"}),
    ),
}
"""By class: one that is derived from these may have other rules."""


def rules(name: str, recipe: Recipe) -> Rules:
    """The laws that a recipe's rules are.

    Raises
    ------
    InputError
        If they are none that could be fitted.
    """
    found = RULES.get(type(recipe))
    if found is None:
        able = [known for known, item in RECIPES.items() if type(item) in RULES]
        raise InputError(
            f"recipe {name!r} cannot take what tuning finds: its rates are no power law of N, D or "
            f"C; {', '.join(able[:-1])} and {able[-1]} can"
        )
    return found


def constants(
    recipe: Recipe, found: Rules, rate: PowerLaw, batch: PowerLaw | None
) -> dict[str, Any]:
    """The constants with which a recipe's rules are the fitted laws, if what multiplies them is 1.

    Without a law of the batch its rule stays as it is.
    """
    made: dict[str, Any] = found.rate.constants(recipe, rate)
    return made | (found.batch.constants(recipe, batch) if batch else {})
