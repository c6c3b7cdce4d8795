"""SweepSpec -> plan: which trials, at which budget, in which role."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from analysis.design import spread
from analysis.errors import InputError
from analysis.numerals import PF_DAY
from analysis.observations import ObservationId
from analysis.wording import plural
from orchestrator.family import corpus_id, family, family_params, vocabulary
from orchestrator.probes import probes
from orchestrator.records import Instant, Whole, parse_record, reason_of, unreadable
from orchestrator.spec import MAX_WIDTH, Budget, SweepSpec
from orchestrator.spec_recipe import KEPT, Recorded
from trainers.corpus import windows_per_pass
from trainers.flops import flops_per_token, params, trial_flops
from trainers.registry import trainer_version
from trainers.shape import Shape
from trainers.simulated import SimulatedSettings
from trainers.template import Command
from trainers.trial import CorpusId, Hyperparameters, Trial

Role = Literal["grid", "replicate", "probe", "held-out", "confirm"]
FIT_ROLES: tuple[Role, ...] = ("grid", "replicate")
"""Roles whose observations enter a fit, unless others are asked for."""

MAX_SPAN_ERROR = 1.5
"""By what factor the span of N may differ from the one asked for, for want of buildable shapes."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One observation that a sweep asks for."""

    trial: Trial
    tokens: int
    """Its horizon, one of the trial's."""
    budget: float
    """Nominal FLOPs."""
    role: Role

    @property
    def id(self) -> ObservationId:
        """Its name in the ledger."""
        return self.trial.key, self.tokens

    @property
    def flops_spent(self) -> float:
        """Exact training FLOPs beyond those of the trial's earlier horizons."""
        steps = self.trial.marginal_steps[self.tokens]
        batch = self.trial.hyperparameters.batch_tokens
        return flops_per_token(self.trial.shape) * steps * batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep asks for, in the order of its spec."""

    name: str
    spec: SweepSpec
    planned: tuple[Planned, ...]

    @property
    def trials(self) -> list[Trial]:
        """Its distinct trials."""
        return list({p.trial.key: p.trial for p in self.planned}.values())

    @property
    def flops(self) -> float:
        """Exact training FLOPs of all trials."""
        return sum(trial_flops(trial) for trial in self.trials)

    @property
    def counted(self) -> str:
        """As in "28 trials and 4 probes", or "28 observations on 9 trunks"."""
        probes = {p.id for p in self.planned if p.role == "probe"}
        others = {p.id for p in self.planned} - probes
        trunks = {key for key, _ in others}
        parts = [plural(len(probes), "probe")] if probes else []
        if len(others) > len(trunks):
            parts.insert(
                0, f"{plural(len(others), 'observation')} on {plural(len(trunks), 'trunk')}"
            )
        elif others:
            parts.insert(0, plural(len(others), "trial"))
        return " and ".join(parts)

    def summary(self) -> dict[str, Any]:
        """The contract of `isoflop plan --json`."""
        by_key: dict[str, list[Planned]] = {}
        for p in self.planned:
            by_key.setdefault(p.trial.key, []).append(p)
        return {
            "name": self.name,
            "trials": [_trial_summary(group) for group in by_key.values()],
            "flops": self.flops,
            "pf_days": self.flops / PF_DAY,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        return {
            "name": self.name,
            "spec": self.spec.model_dump(mode="json"),
            "recipe": Recorded.to_record(self.spec.recipe),
            "trials": [trial.to_dict() for trial in self.trials],
            "planned": [
                {"trial": p.trial.key, "tokens": p.tokens, "budget": p.budget, "role": p.role}
                for p in self.planned
            ],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Build a plan from what `to_dict` gave."""
        asked = [_AskedRecord(**planned) for planned in data["planned"]]
        trials = [Trial.from_dict(trial) for trial in data["trials"]]
        return _built(data["name"], data["spec"], data.get("recipe"), trials, asked)


def _built(
    name: str,
    spec: dict[str, Any],
    recipe: dict[str, Any] | None,
    trials: Iterable[Trial],
    asked: Iterable[_AskedRecord],
) -> Plan:
    by_key = {trial.key: trial for trial in trials}
    return Plan(
        name=name,
        spec=SweepSpec.model_validate(spec, strict=False, context={KEPT: recipe}),
        planned=tuple(
            Planned(trial=by_key[a.trial], tokens=a.tokens, budget=a.budget, role=a.role)
            for a in asked
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _AskedRecord:
    """An observation in a plan's record."""

    trial: str
    tokens: Whole
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    role: Role


@dataclass(frozen=True, kw_only=True)
class _PlanRecord:
    """A plan's record: the types of what a plan is built from."""

    name: str
    spec: dict[str, Any]
    trials: list[dict[str, Any]]
    planned: list[_AskedRecord]
    recipe: dict[str, Any] | None = None
    saved_at: Instant | None = None


@dataclass(frozen=True, kw_only=True)
class KeptPlan:
    """A plan as a project keeps it."""

    plan: Plan
    saved_at: str
    """When it was last changed: UTC, ISO format; empty where an early version did not say."""


def parse_plan(name: str, place: str, data: bytes) -> KeptPlan:
    """Return the plan called `name` from its record, which anybody may have written.

    Nothing is imported: a recipe that isoflop does not have itself stays what is on record of it.

    Raises
    ------
    InputError
        If the record is damaged, of another version or of another plan, or says of a trial's key
        what does not follow from its content.
    """
    record = parse_record(_PlanRecord, place, data)
    if record.name != name:
        raise unreadable(place, f"it is the plan {record.name}")
    try:
        trials = [Trial.from_dict(trial) for trial in record.trials]
        _require_types(trials, record.trials)
        plan = _built(name, record.spec, record.recipe, trials, record.planned)
    except InputError as error:
        raise unreadable(place, str(error)) from error
    except ValidationError as error:
        raise unreadable(place, reason_of(error)) from error
    except KeyError as error:
        raise unreadable(place, f"it lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise unreadable(place, f"{type(error).__name__}: {error}") from error
    if not plan.planned:
        raise unreadable(place, "it asks for nothing")
    for asked in plan.planned:
        if asked.tokens not in asked.trial.measured_at:
            raise unreadable(place, f"trial {asked.trial.key} has no horizon {asked.tokens}")
    return KeptPlan(plan=plan, saved_at=record.saved_at or "")


def _require_types(trials: Sequence[Trial], records: Sequence[dict[str, Any]]) -> None:
    """Refuse trials with values of other types than theirs.

    They are compared with what their types make of them, and not replaced by it: of 1 and 1.0 keys
    are not the same.
    """
    # As JSON, in which a list may be a tuple and a table a dataclass, also where types are strict.
    for trial, typed in zip(trials, _trials().validate_json(json.dumps(records)), strict=True):
        if trial != typed:
            raise InputError(f"trial {trial.key} has a value of another type than it should have")


@lru_cache
def _trials() -> TypeAdapter[list[Trial]]:
    return TypeAdapter(list[Trial])


def _trial_summary(group: list[Planned]) -> dict[str, Any]:
    trial = group[0].trial
    counted = params(trial.shape)
    return {
        "key": trial.key,
        "params_non_embedding": counted.non_embedding,
        "params_total": counted.total,
        "width": trial.shape.width,
        "depth": trial.shape.depth,
        "batch_tokens": trial.hyperparameters.batch_tokens,
        "learning_rate": trial.hyperparameters.matrix_rate,
        "seed": trial.seed,
        "horizons": [
            {
                "tokens": p.tokens,
                "budget": p.budget,
                "flops_exact": flops_per_token(p.trial.shape) * p.tokens,
                "flops_spent": p.flops_spent,
                "role": p.role,
            }
            for p in group
        ],
    }


def make_plan(spec: SweepSpec) -> Plan:
    """Resolve a spec into trials.

    Raises
    ------
    InputError
        If a budget is too small for a shape, too few shapes can be built, the corpus or a file of
        the command is missing or has the wrong size, or a horizon is longer than the corpus allows.
    """
    corpus = corpus_id(spec)
    command = spec.command.command() if spec.command else None
    cells = [
        (budget, shape, seed)
        for budget in spec.budgets
        for shape in _sizes(spec, budget)
        for seed in spec.seeds
    ]
    if trunks_wanted(spec):
        if command is not None:
            raise InputError(
                'trainer = "command" measures a training at its end alone, and schedule = "wsd" at '
                "every budget's horizon: leave the schedule out, which is cosine then"
            )
        planned = _trunks(spec, cells, corpus)
    else:
        planned = []
        for budget, shape, seed in cells:
            trial = _trial(spec, budget, shape, corpus, seed, command)
            planned.append(_planned(spec, trial, trial.tokens, budget))
    _check_epochs(spec, planned)
    _check_distinct(planned)
    _check_sizes_told(spec, planned)
    planned += probes(spec, planned)
    return Plan(name=spec.name, spec=spec, planned=tuple(planned))


def trunks_wanted(spec: SweepSpec) -> bool:
    """Whether one training of a size serves all budgets."""
    return getattr(spec.recipe.rules, "schedule", "cosine") == "wsd"


def _planned(spec: SweepSpec, trial: Trial, tokens: int, budget: Budget) -> Planned:
    role: Role = "grid" if trial.seed == spec.seeds[0] else "replicate"
    return Planned(trial=trial, tokens=tokens, budget=budget.flops, role=role)


def _trunks(
    spec: SweepSpec, cells: list[tuple[Budget, Shape, int]], corpus: CorpusId
) -> list[Planned]:
    """One trial for all budgets of a size and seed, measured at the horizon of each.

    Batch and rates are those of the prior optimum, `tokens_per_param` tokens a parameter, whatever
    the horizons are: so a trunk that is extended by another budget is the same trial.
    """
    by_trunk: dict[tuple[Shape, int], dict[int, Budget]] = {}
    made: dict[tuple[Shape, int], Trial] = {}
    for budget, shape, seed in cells:
        if (shape, seed) not in made:
            tokens = spec.tokens_per_param * params(shape).non_embedding
            made[shape, seed] = trial_of(spec, shape, tokens, corpus, seed)
        batch = made[shape, seed].hyperparameters.batch_tokens
        steps = max(1, round(budget.flops / flops_per_token(shape) / batch))
        other = by_trunk.setdefault((shape, seed), {}).setdefault(steps * batch, budget)
        if other is not budget:
            raise InputError(
                f"budgets {other.flops:.10g} and {budget.flops:.10g} are so close that width "
                f"{shape.width} has one and the same horizon at both: drop one of them"
            )
    planned = []
    for name, horizons in by_trunk.items():
        try:
            trunk = replace(made[name], horizons=tuple(sorted(horizons)))
        except InputError as error:
            raise InputError(f"width {name[0].width}: {error}") from error
        planned += [_planned(spec, trunk, n, budget) for n, budget in horizons.items()]
    order = {budget.flops: i for i, budget in enumerate(spec.budgets)}
    return sorted(planned, key=lambda p: order[p.budget])


def _sizes(spec: SweepSpec, budget: Budget) -> list[Shape]:
    """The shapes of one budget: as given, or log-spaced around the prior optimum."""
    if budget.widths:
        architecture = spec.recipe.rules.architecture
        return [spec.shapes.shape(w, vocabulary(spec), architecture) for w in budget.widths]
    shapes, n = family_params(spec, "non_embedding")
    if not shapes:
        raise InputError(
            f"no model up to a width of {MAX_WIDTH:,} has the shapes asked for: give a smaller "
            "width_multiple, heads or head_width"
        )
    tokens = budget.flops / np.array([flops_per_token(shape) for shape in shapes])
    # D/N falls with N, so ln N of the prior optimum is where it crosses tokens_per_param.
    log_ratio = np.log(tokens / n / spec.tokens_per_param)
    centre = float(np.exp(np.interp(0.0, -log_ratio, np.log(n))))
    if not n[0] < centre < n[-1]:
        raise InputError(
            f"budget {budget.flops:g}: its prior optimum, {spec.tokens_per_param:g} tokens a "
            f"parameter, lies outside the sizes that can be built ({n[0]:.3g} to {n[-1]:.3g} "
            "parameters): change tokens_per_param, shapes or the budget"
        )
    low, high = centre / spec.span**0.5, centre * spec.span**0.5
    if trunks_wanted(spec):  # the rungs of one ladder, so that budgets share their trunks
        rung = spec.span ** (1 / (spec.sizes - 1))
        lowest = max(0, round(np.log(low / n[0]) / np.log(rung)))
        low, high = n[0] * rung**lowest, n[0] * rung**lowest * spec.span
    chosen = spread(n, max(low, n[0]), min(high, n[-1]), spec.sizes)
    span = n[chosen[-1]] / n[chosen[0]]
    if not 1 / MAX_SPAN_ERROR < span / spec.span < MAX_SPAN_ERROR:
        raise InputError(
            f"budget {budget.flops:g}: {spec.sizes} of the buildable sizes span {span:.3g}x in N, "
            f"not the {spec.span:g}x asked for: give other sizes or span, a smaller "
            "width_multiple, or widths"
        )
    return [shapes[i] for i in chosen]


def _trial(
    spec: SweepSpec,
    budget: Budget,
    shape: Shape,
    corpus: CorpusId,
    seed: int,
    command: Command | None,
) -> Trial:
    recipe = spec.recipe.rules
    tokens = budget.flops / flops_per_token(shape)
    least = recipe.min_steps * shape.context
    if tokens < least:
        raise InputError(
            f"budget {budget.flops:g} FLOPs buys width {shape.width} only {tokens:,.0f} tokens, "
            f"and the {recipe.min_steps} steps of {shape.context} tokens that a training takes at "
            f"least are {least:,}: give the budget {flops_per_token(shape) * least:.2g} FLOPs or "
            "more, or smaller widths"
        )
    return trial_of(spec, shape, tokens, corpus, seed, command)


def trial_of(
    spec: SweepSpec,
    shape: Shape,
    tokens: float,
    corpus: CorpusId,
    seed: int,
    command: Command | None = None,
) -> Trial:
    """A trial of a sweep: a shape trained on about so many tokens, as its recipe says."""
    return Trial(
        trainer=spec.trainer,
        trainer_version=trainer_version(spec.trainer),
        shape=shape,
        hyperparameters=_resolved(spec, shape, tokens),
        corpus=corpus,
        recipe=spec.recipe.id,
        seed=seed,
        settings=_settings(spec),
        command=command,
        deterministic=spec.deterministic,
    )


def _resolved(spec: SweepSpec, shape: Shape, tokens: float) -> Hyperparameters:
    """What a sweep's recipe makes of them.

    Raises
    ------
    InputError
        If that is nothing to train with.
    """
    where = f"recipe {spec.recipe.name} at width {shape.width} on {tokens:,.0f} tokens"
    try:
        return spec.recipe.rules.resolve(shape, tokens)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ArithmeticError, ValueError) as error:  # of rules, where constants are extreme
        raise InputError(f"{where} gives no numbers ({error}): change its constants") from error


def _settings(spec: SweepSpec) -> tuple[tuple[str, float], ...]:
    """What the simulated trainer is told, where it is not the default: so keys outlive new ones."""
    if spec.trainer != "simulated":
        return ()
    told, default = asdict(spec.simulated), asdict(SimulatedSettings())
    return tuple(sorted((name, v) for name, v in told.items() if v != default[name]))


def trainable(spec: SweepSpec, flops: float) -> list[Shape]:
    """Those shapes of a sweep's family whose horizon at `flops` is neither too short nor too long.

    Too short is fewer than the recipe's least steps; too long, more epochs than the spec allows.
    """
    least = spec.recipe.rules.min_steps * spec.shapes.context
    most = most_tokens(spec, corpus_id(spec))
    return [shape for shape in family(spec) if least <= flops / flops_per_token(shape) <= most]


def most_tokens(spec: SweepSpec, corpus: CorpusId) -> float:
    """The longest horizon that a sweep's corpus and epochs allow, tokens."""
    if not corpus.train_tokens:
        return float("inf")
    context = spec.shapes.context
    return windows_per_pass(corpus.train_tokens, context) * context * spec.epochs


def _check_distinct(planned: list[Planned]) -> None:
    budgets: dict[ObservationId, float] = {}
    for p in planned:
        other = budgets.setdefault(p.id, p.budget)
        if other != p.budget:
            raise InputError(
                f"budgets {other:.10g} and {p.budget:.10g} are so close that width "
                f"{p.trial.shape.width} is one and the same trial at both: drop one of them"
            )


def _check_sizes_told(spec: SweepSpec, planned: list[Planned]) -> None:
    """Refuse two sizes that a command, which is not told the width, could not tell apart."""
    if spec.command is None or "width" in spec.command.told:
        return
    names = sorted({"depth", "heads"} & spec.command.told)
    widths: dict[tuple[int, ...], int] = {}
    for p in planned:
        shape = p.trial.shape
        told = tuple(getattr(shape, name) for name in names)
        other = widths.setdefault(told, shape.width)
        if other != shape.width:
            listed = " and ".join(f"{name} {n}" for name, n in zip(names, told, strict=True))
            raise InputError(
                f"widths {other} and {shape.width} have {listed} both, and the command is not told "
                "the width: give it {width}, or other sizes"
            )


def text_limit(spec: SweepSpec) -> str:
    """Return which key of a sweep bounds the tokens of one pass over its text."""
    if getattr(spec.corpus, "unique_tokens", None) is not None:
        return "corpus.unique_tokens"
    return "corpus.tokens" if hasattr(spec.corpus, "tokens") else "more text"


def _check_epochs(spec: SweepSpec, planned: list[Planned]) -> None:
    longest = max(planned, key=lambda p: p.tokens)
    trial = longest.trial
    most = most_tokens(spec, trial.corpus)
    if longest.tokens > most:
        one_pass = most / spec.epochs
        epochs = longest.tokens / one_pass
        limit = text_limit(spec)
        more = limit if limit == "more text" else f"more text ({limit})"
        raise InputError(
            f"budget {longest.budget:g} trains width {trial.shape.width} on {longest.tokens:,} "
            f"tokens, {epochs:.2f} epochs of corpus {trial.corpus.name} ({one_pass:,.0f} tokens), "
            f"and epochs = {spec.epochs:g} allows no more: give {more}, or set epochs = "
            f"{np.ceil(epochs):.0f} to allow repetition"
        )
