"""What probes say: models' best rates and batches, and the laws and the recipe that these make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from analysis.errors import InputError
from analysis.tuning import Bowl, Optimum, PowerLaw, bowl, power_law
from orchestrator.spec import SweepSpec
from orchestrator.spec_recipe import RecipeSpec
from orchestrator.tune_design import Model, Point, best_of, next_points
from trainers.recipe import Recipe
from trainers.tuned import VARIABLES, Rule, constants, rules

TIED = 0.1
"""Range of ln(D/N) over the models below which D says nothing that N does not."""
KEPT = "the batch's rule is left as it was, and rates are the best ones at the recipe's own batches"
Axis = Literal["rate", "batch"]


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """One model's probes and what they say."""

    model: Model
    losses: Mapping[Point, float]
    """By point; infinite where it diverged."""
    bowl: Bowl

    @property
    def edges(self) -> list[str]:
        """Of what the optimum may lie beyond the probes, on which side, and what to do."""
        found = []
        for axis, down in self._open:
            remedy = "raise --trials" if self._past(axis, down) else "no other can be trained"
            name, end = ("rate", "batch")[axis], "lowest" if down else "highest"
            found.append(
                f"the best {name} is the {end} that was probed, a bound that no law takes: {remedy}"
            )
        return found

    @property
    def beyond(self) -> list[Point]:
        """Points past the edges on which the optimum lies, though the best probe lies within."""
        return list(dict.fromkeys(p for axis, down in self._open for p in self._past(axis, down)))

    @property
    def _open(self) -> list[tuple[int, bool]]:
        """Axes, of rate and batch, on whose lower edge the optimum is, or upper one."""
        places = (self.bowl.rate.place, self.bowl.batch.place)[: 1 if self.bowl.fixed_batch else 2]
        return [(i, place == "below") for i, place in enumerate(places) if place != "interior"]

    def _past(self, axis: int, down: bool) -> list[Point]:
        """Points that can be trained next beyond the outermost ones, beside the best one."""
        ends, best = [point[axis] for point in self.losses], best_of(self.losses)
        end = min(ends) - 1 if down else max(ends) + 1
        beside = (best[1 - axis] + k for k in (0, -1, 1))
        points = [(end, other) if axis == 0 else (other, end) for other in beside]
        return [point for point in points if self.model.trial(point) is not None]


def fitted(model: Model, losses: Mapping[Point, float], level: float) -> TunedModel:
    """What the losses of one model's probes say.

    Raises
    ------
    InputError
        If too many of them diverged.
    """
    whole = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
    trials = [trial for point in whole if (trial := model.trial(point)) is not None]
    try:
        found = bowl(
            np.array([trial.hyperparameters.matrix_rate for trial in trials]),
            np.array([trial.hyperparameters.batch_tokens for trial in trials], dtype=np.float64),
            np.array(list(whole.values())),
            level,
            usual_batch=model.base.hyperparameters.batch_tokens,
        )
    except InputError as error:
        raise InputError(
            f"width {model.shape.width}: {len(losses) - len(whole)} of {len(losses)} probes "
            f"diverged, and {error}: set a lower rate_factor of the recipe"
        ) from error
    return TunedModel(model=model, losses=losses, bowl=found)


def further_points(
    model: Model, losses: Mapping[Point, float], most: int, level: float
) -> list[Point]:
    """Points to probe after these: around the best one, then past an edge that the optimum is on.

    None where both lie within what was probed, or `most` are.
    """
    found = next_points(model, losses, most)
    if found or len(losses) >= most:
        return found
    try:
        return fitted(model, losses, level).beyond[: most - len(losses)]
    except InputError:  # too many diverged, which is said when all are there
        return []


@dataclass(frozen=True, kw_only=True)
class TunedRecipe:
    """The laws through models' optima, and the recipe that they make."""

    found: tuple[TunedModel, ...]
    """The models, with the rates that the law goes through."""
    rate: PowerLaw
    batch: PowerLaw | None
    """None where the probes tell none, so that the recipe's rule is kept."""
    recipe: RecipeSpec
    notes: tuple[str, ...]
    """What weakens the answer, a sentence each."""


def tuned_recipe(spec: SweepSpec, found: Sequence[TunedModel], level: float) -> TunedRecipe:
    """Fit the laws of rate and batch, and make a recipe of them.

    Where there is no law of the batch, models keep the recipe's, and a rate is the best one there:
    along a tilted valley that of another batch is another.

    Raises
    ------
    InputError
        If the probes tell no law of the rate.
    """
    recipe = spec.recipe.rules
    taken = rules(spec.recipe.name, recipe)
    notes: list[str] = []
    batch: PowerLaw | None = None
    if any(item.bowl.fixed_batch for item in found):
        notes.append(
            f"some sizes train on so few tokens that no other batch could be probed: {KEPT}"
        )
    else:
        try:
            batch, held = _law(recipe, taken.batch, found, "batch", level)
            notes += held
        except InputError as error:
            notes.append(f"no law of the batch: {error}; {KEPT}")
    if batch is None:
        found = [replace(item, bowl=item.bowl.at_usual) for item in found]
    try:
        rate, held = _law(recipe, taken.rate, found, "rate", level)
    except InputError as error:
        bounds = any(item.bowl.rate.place != "interior" for item in found)
        nearer = "; raise --trials, or set a rate_factor of the recipe that is nearer to them"
        raise InputError(f"no law of the rate: {error}{nearer if bounds else ''}") from error
    notes += held
    kept = dict(spec.recipe.model_extra or {})
    kept.pop("rate_factor", None)
    if batch is not None:
        kept.pop("batch_factor", None)
    made = RecipeSpec(name=spec.recipe.name, **kept | constants(recipe, taken, rate, batch))
    return TunedRecipe(
        found=tuple(found),
        rate=rate,
        batch=batch,
        recipe=made,
        notes=(*_doubts(found), *notes),
    )


def _law(
    recipe: Recipe, rule: Rule, found: Sequence[TunedModel], axis: Axis, level: float
) -> tuple[PowerLaw, tuple[str, ...]]:
    """The law of a rule through the models' optima, and what was held in it.

    An exponent that they do not tell from the recipe's own is the recipe's: small models of about
    one size would else have laws that no larger one follows.
    """
    optima: list[Optimum] = [getattr(item.bowl, axis) for item in found]
    values = {
        name: np.array([VARIABLES[name](m.model.shape, m.model.base.tokens) for m in found])
        for name in rule.exponents
    }
    own = {name: float(getattr(recipe, field)) for name, field in rule.exponents.items()}
    pairs = zip(found, optima, strict=True)
    dof = sum(item.bowl.dof for item, optimum in pairs if optimum.place == "interior")
    through = partial(power_law, optima, values, dof=dof, level=level)
    given: dict[str, float] = {}
    notes: list[str] = []
    if {"N", "D"} <= set(values) and np.ptp(np.log(values["D"] / values["N"])) < TIED:
        given["D"] = own["D"]
        notes.append(
            "D goes with N in these probes, so that the exponent of D is the recipe's own, "
            f"{given['D']:g}: give several --tokens-per-param to fit it"
        )
    try:
        law = through(given=given)
    except InputError as error:
        law = through(given=own)
        return law, (f"the {axis} has the recipe's own exponents: {error}",)
    for name, said in law.exponents.items():
        if name not in given and said.low <= own[name] <= said.high:
            given[name] = own[name]
            notes.append(
                f"the {axis}'s exponent of {name} is the recipe's own, {own[name]:.3g}: by the "
                f"probes it is {said.low:.3g} to {said.high:.3g}"
            )
    return through(given=given), tuple(notes)


def _doubts(found: Sequence[TunedModel]) -> list[str]:
    """What a person should look at before using the laws."""
    return [
        f"width {item.model.shape.width}, {item.model.base.tokens:,} tokens: {edge}"
        for item in found
        for edge in item.edges
    ]
