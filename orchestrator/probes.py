"""What a plan has beside its grid to see whether its recipe's rates hold, and what speaks against.

A probe is a trial of the grid at half or double the peak rate. Undertuned small models are why
Kaplan's and Hoffmann's exponents differ (Porian et al. 2024, arXiv 2406.19146).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import InputError
from orchestrator.spec import SweepSpec
from trainers.flops import params, trial_flops
from trainers.recipe import Recipe, probed
from trainers.trial import Probe, Trial

if TYPE_CHECKING:
    from orchestrator.planner import Plan, Planned

FACTORS = (0.5, 2.0)
"""Of the peak rate: a rate that is off by less costs less than runs differ by."""
SIZES = 2
"""That get probes unless a sweep says otherwise: the smallest and the largest."""
NAMELESS = (
    "files is empty, so that no key knows what the program is, and rows stay when it changes: name "
    "its files, or give env a version that you change with it"
)
BATCH = ("batch_tokens", "sequences", "tokens")
BATCHLESS = (
    "it is told none of {batch_tokens}, {sequences} and {tokens}, so that {steps} of its own "
    "batches may be another D than its rows say: give it one, or have it say tokens in its result"
)
FLAT = (
    "it is not told {depth}, which grows with the width (shapes.aspect): if it does not know by "
    "itself, its models are others than their rows say"
)
SHARE = 0.1
"""Of a sweep's FLOPs that probes take at most, unless it asks for them."""


@dataclass(frozen=True, kw_only=True)
class Caution:
    """That some of a plan's trials may not be what they seem."""

    about: Literal["recipe", "command"]
    """`recipe`: its source says little of them; `command`: their keys do."""
    reason: str
    """Who found the rule, and in which range; or why, and what to do."""
    trials: int
    """That it concerns."""
    of: int
    """Trials of the plan."""

    def __str__(self) -> str:
        if self.about == "command":
            return f"command: {self.reason}"
        are = "is" if self.trials == 1 else "are"
        return (
            f"recipe: {self.reason}; {self.trials} of {self.of} trials {are} outside of that, "
            "where its rates and batches are an extrapolation"
        )


def cautions(plan: Plan) -> list[Caution]:
    """Reasons to doubt a plan's recipe, the most frequent first, and its command's keys."""
    found, command = _of_recipe(plan), plan.spec.command
    if command is not None:
        trials = len(plan.trials)
        found += [
            Caution(about="command", reason=reason, trials=trials, of=trials)
            for doubtful, reason in (
                (not command.files, NAMELESS),
                (command.told.isdisjoint(BATCH), BATCHLESS),
                (plan.spec.shapes.aspect is not None and "depth" not in command.told, FLAT),
            )
            if doubtful
        ]
    return found


def _of_recipe(plan: Plan) -> list[Caution]:
    if plan.spec.trainer == "simulated":  # nothing of a recipe but whole steps enters its loss
        return []
    # A person's own recipe need not know of its range.
    says = getattr(plan.spec.recipe.rules, "caution", lambda shape, tokens: None)
    found: dict[str, set[str]] = {}
    for p in plan.planned:
        if reason := says(p.trial.shape, p.tokens):
            found.setdefault(reason, set()).add(p.trial.key)
    total = len(plan.trials)
    said = [
        Caution(about="recipe", reason=why, trials=len(keys), of=total)
        for why, keys in found.items()
    ]
    return sorted(said, key=lambda item: -item.trials)


def cautions_json(plan: Plan) -> list[dict[str, Any]]:
    """The cautions of a plan, JSON-ready."""
    return [{name: v for name, v in asdict(c).items() if name != "of"} for c in cautions(plan)]


def deaf(spec: SweepSpec, *wanted: str) -> str | None:
    """Why a sweep's trials would not train otherwise at another rate; None where they would.

    `wanted` are placeholders besides the rate, of which a command has to be told one.
    """
    if spec.trainer == "simulated":
        return 'trainer = "simulated" samples a law in which no learning rate occurs'
    if spec.command is None:
        return None
    for names in (("learning_rate",), wanted):
        if names and spec.command.told.isdisjoint(names):
            return f"its command is told no {' or '.join(f'{{{name}}}' for name in names)}"
    return None


def probes(spec: SweepSpec, planned: Sequence[Planned]) -> list[Planned]:
    """The probes of a sweep, at its smallest budget, where they cost least.

    Sizes from the smallest to the largest have them: along a budget the small ones train longest
    for their size, the large ones shortest, so the two ends see a rule that is wrong in N or in D.

    Raises
    ------
    InputError
        If a sweep asks for probes that could show nothing.
    """
    if not (SIZES if spec.probes is None else spec.probes):
        return []
    if reason := deaf(spec):
        if spec.probes:
            raise InputError(f"probes = {spec.probes} would show nothing: {reason}; set probes = 0")
        return []
    lowest = min(p.budget for p in planned)
    rungs = [p for p in planned if p.role == "grid" and p.budget == lowest]
    rungs.sort(key=lambda p: params(p.trial.shape).non_embedding)
    if spec.probes is not None:
        return _around(rungs, spec.probes, spec.recipe.rules)
    flops = sum(trial_flops(trial) for trial in {p.trial.key: p.trial for p in planned}.values())
    for sizes in range(SIZES, 0, -1):
        found = _around(rungs, sizes, spec.recipe.rules)
        cost = sum(trial_flops(p.trial) for p in found)
        if cost <= SHARE * (flops + cost):
            return found
    return []


def _around(rungs: Sequence[Planned], sizes: int, recipe: Recipe) -> list[Planned]:
    """Probes of so many of the rungs, evenly spread from the first one to the last."""
    chosen = np.unique(np.linspace(0, len(rungs) - 1, min(sizes, len(rungs))).round().astype(int))
    return [
        replace(rung, trial=_of_rate(rung.trial, rung.tokens, factor, recipe), role="probe")
        for rung in (rungs[i] for i in chosen)
        for factor in FACTORS
    ]


def _of_rate(trial: Trial, tokens: int, factor: float, recipe: Recipe) -> Trial:
    """The same to one horizon at other rates; a branch of a trunk equals the run to it alone."""
    return probed(trial.only({tokens}), Probe(rate=factor), recipe)


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """What a plan's probes are, and what they take."""

    trials: int
    widths: tuple[int, ...]
    budget: float | None
    """Nominal FLOPs of each."""
    flops: float
    share: float
    """Of the plan's FLOPs."""


def probe_cost(plan: Plan) -> ProbeCost:
    """What the probes of a plan take."""
    found = {p.trial.key: p for p in plan.planned if p.role == "probe"}
    flops = sum(trial_flops(p.trial) for p in found.values())
    return ProbeCost(
        trials=len(found),
        widths=tuple(sorted({p.trial.shape.width for p in found.values()})),
        budget=min((p.budget for p in found.values()), default=None),
        flops=flops,
        share=flops / plan.flops,
    )
