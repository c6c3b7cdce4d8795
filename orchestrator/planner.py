"""SweepSpec -> plan: which trials, at which budget, in which role."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from analysis.design import spread
from analysis.errors import InputError
from analysis.observations import FloatArray, FlopsConvention, ObservationId, ParamsConvention
from analysis.optimum import FlopsPerToken
from orchestrator.spec import Budget, SweepSpec
from trainers.corpus import (
    HuggingFace,
    declared_hash,
    describe,
    heldout_windows,
    load,
    windows_per_pass,
)
from trainers.corpus import vocabulary as corpus_vocabulary
from trainers.flops import flops_per_token, params, trial_flops
from trainers.recipe import identity, named
from trainers.registry import trainer_version
from trainers.simulated import SimulatedSettings
from trainers.trial import CorpusId, Shape, Trial

Role = Literal["grid", "replicate", "probe", "held-out", "confirm"]
FIT_ROLES: tuple[Role, ...] = ("grid", "replicate")
"""Roles whose observations enter a fit, unless others are asked for."""

PF_DAY = 1e15 * 86400
"""FLOPs of a petaFLOP/s-day (Kaplan et al. 2020)."""

SIMULATED_VOCABULARY = 256

MAX_SPAN_ERROR = 1.5
"""By what factor the span of N may differ from the one asked for, for want of buildable shapes."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One observation that a sweep asks for."""

    trial: Trial
    budget: float
    """Nominal FLOPs."""
    role: Role

    @property
    def id(self) -> ObservationId:
        """Its name in the ledger."""
        return self.trial.key, self.trial.tokens


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
            "trials": [trial.to_dict() for trial in self.trials],
            "planned": [
                {"trial": p.trial.key, "tokens": p.trial.tokens, "budget": p.budget, "role": p.role}
                for p in self.planned
            ],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Build a plan from what `to_dict` gave."""
        trials = {trial.key: trial for trial in map(Trial.from_dict, data["trials"])}
        return Plan(
            name=data["name"],
            spec=SweepSpec.model_validate(data["spec"], strict=False),
            planned=tuple(
                Planned(trial=trials[p["trial"]], budget=p["budget"], role=p["role"])
                for p in data["planned"]
            ),
        )


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
                "tokens": p.trial.tokens,
                "budget": p.budget,
                "flops_exact": trial_flops(p.trial),
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
        If a budget is too small for a shape, too few shapes can be built, the corpus is missing or
        too small, or a horizon is longer than the corpus allows.
    """
    corpus = _corpus_id(spec)
    planned = []
    for budget in spec.budgets:
        for shape in _sizes(spec, budget):
            for seed in spec.seeds:
                trial = _trial(spec, budget, shape, corpus, seed)
                role: Role = "grid" if seed == spec.seeds[0] else "replicate"
                planned.append(Planned(trial=trial, budget=budget.flops, role=role))
    _check_epochs(spec, planned)
    _check_distinct(planned)
    return Plan(name=spec.name, spec=spec, planned=tuple(planned))


def vocabulary(spec: SweepSpec) -> int:
    """Symbols of the models of a sweep."""
    return SIMULATED_VOCABULARY if spec.trainer == "simulated" else corpus_vocabulary(spec.corpus)


def family_params(spec: SweepSpec, convention: ParamsConvention) -> tuple[list[Shape], FloatArray]:
    """Every buildable shape of a sweep, and its N, ascending."""
    shapes = spec.shapes.family(vocabulary(spec))
    return shapes, np.array([getattr(params(s), convention) for s in shapes], dtype=np.float64)


def family_cost(
    spec: SweepSpec, *, params: ParamsConvention, flops: FlopsConvention
) -> FlopsPerToken:
    """Training FLOPs a token of a sweep's family of shapes as a function of N."""
    if flops == "6nd":
        return FlopsPerToken.six_n()
    shapes, n = family_params(spec, params)
    return FlopsPerToken(n, np.array([flops_per_token(shape) for shape in shapes]))


def _corpus_id(spec: SweepSpec) -> CorpusId:
    if spec.trainer == "simulated":
        return CorpusId(name="none", hash="", heldout_hash="", train_tokens=0, source=None)
    source = spec.corpus
    if isinstance(source, HuggingFace):  # planned without downloading it
        declared = declared_hash(source)
        return CorpusId(
            name=describe(source),
            hash=declared,
            heldout_hash=declared,
            train_tokens=source.train_tokens,
            source=source,
        )
    corpus = load(source)
    heldout_windows(corpus, spec.shapes.context)
    return CorpusId(
        name=corpus.name,
        hash=corpus.hashes[0],
        heldout_hash=corpus.hashes[1],
        train_tokens=len(corpus.train),
        source=source,
    )


def _sizes(spec: SweepSpec, budget: Budget) -> list[Shape]:
    """The shapes of one budget: as given, or log-spaced around the prior optimum."""
    if budget.widths:
        return [spec.shapes.shape(width, vocabulary(spec)) for width in budget.widths]
    family, n = family_params(spec, "non_embedding")
    tokens = budget.flops / np.array([flops_per_token(shape) for shape in family])
    # D/N falls with N, so ln N of the prior optimum is where it crosses tokens_per_param.
    log_ratio = np.log(tokens / n / spec.tokens_per_param)
    centre = float(np.exp(np.interp(0.0, -log_ratio, np.log(n))))
    if not n[0] < centre < n[-1]:
        raise InputError(
            f"budget {budget.flops:g}: its prior optimum, {spec.tokens_per_param:g} tokens a "
            f"parameter, lies outside the sizes that can be built ({n[0]:.3g} to {n[-1]:.3g} "
            "parameters): change tokens_per_param, shapes or the budget"
        )
    half = spec.span**0.5
    chosen = spread(n, max(centre / half, n[0]), min(centre * half, n[-1]), spec.sizes)
    span = n[chosen[-1]] / n[chosen[0]]
    if not 1 / MAX_SPAN_ERROR < span / spec.span < MAX_SPAN_ERROR:
        raise InputError(
            f"budget {budget.flops:g}: {spec.sizes} of the buildable sizes span {span:.3g}x in N, "
            f"not the {spec.span:g}x asked for: give other sizes or span, a smaller "
            "width_multiple, or widths"
        )
    return [family[i] for i in chosen]


def _trial(spec: SweepSpec, budget: Budget, shape: Shape, corpus: CorpusId, seed: int) -> Trial:
    recipe = named(spec.recipe)
    tokens = budget.flops / flops_per_token(shape)
    least = recipe.min_steps * shape.context
    if tokens < least:
        raise InputError(
            f"budget {budget.flops:g} FLOPs buys width {shape.width} only {tokens:,.0f} tokens, "
            f"and the {recipe.min_steps} steps of {shape.context} tokens that a training takes at "
            f"least are {least:,}: give the budget {flops_per_token(shape) * least:.2g} FLOPs or "
            "more, or smaller widths"
        )
    settings = _settings(spec)
    return Trial(
        trainer=spec.trainer,
        trainer_version=trainer_version(spec.trainer),
        shape=shape,
        hyperparameters=recipe.resolve(shape, tokens),
        corpus=corpus,
        recipe=identity(spec.recipe),
        seed=seed,
        settings=settings,
    )


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
    least = named(spec.recipe).min_steps * spec.shapes.context
    most = _most_tokens(spec, _corpus_id(spec))
    return [
        shape
        for shape in spec.shapes.family(vocabulary(spec))
        if least <= flops / flops_per_token(shape) <= most
    ]


def _most_tokens(spec: SweepSpec, corpus: CorpusId) -> float:
    if corpus.source is None:
        return float("inf")
    context = spec.shapes.context
    return windows_per_pass(corpus.train_tokens, context) * context * spec.epochs


def _check_distinct(planned: list[Planned]) -> None:
    budgets: dict[str, float] = {}
    for p in planned:
        other = budgets.setdefault(p.trial.key, p.budget)
        if other != p.budget:
            raise InputError(
                f"budgets {other:.10g} and {p.budget:.10g} are so close that width "
                f"{p.trial.shape.width} is one and the same trial at both: drop one of them"
            )


def _check_epochs(spec: SweepSpec, planned: list[Planned]) -> None:
    longest = max(planned, key=lambda p: p.trial.tokens)
    trial = longest.trial
    most = _most_tokens(spec, trial.corpus)
    if trial.tokens > most:
        one_pass = most / spec.epochs
        epochs = trial.tokens / one_pass
        raise InputError(
            f"budget {longest.budget:g} trains width {trial.shape.width} on {trial.tokens:,} "
            f"tokens, {epochs:.2f} epochs of corpus {trial.corpus.name} ({one_pass:,.0f} tokens): "
            f"give more text, or set epochs = {np.ceil(epochs):.0f} to allow repetition"
        )
