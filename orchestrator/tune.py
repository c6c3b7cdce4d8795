"""Tuning a recipe: probes of rate and batch at a few sizes, and the laws through their optima.

Probes are trials as any: Ray Tune trains them, the project's ledger keeps them, and what has been
measured is not trained again. They are planned as probes, so that no fit of the project takes them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from analysis.errors import InputError
from orchestrator.conclusion import write
from orchestrator.connection import connected
from orchestrator.lease import Lease, hold
from orchestrator.loop import tidy
from orchestrator.mirror import Mirror
from orchestrator.planner import Plan, make_plan
from orchestrator.probes import deaf
from orchestrator.progress import Board, Progress
from orchestrator.project import Project, missing
from orchestrator.spec import SweepSpec, parse_spec, to_toml
from orchestrator.spec_recipe import RecipeSpec
from orchestrator.storage import split
from orchestrator.sweep import End, train
from orchestrator.tracking import store_of
from orchestrator.tune_design import BLOCK, Model, Point, models, planned
from orchestrator.tune_laws import TunedModel, TunedRecipe, fitted, further_points, tuned_recipe
from trainers.trial import Trial
from trainers.tuned import rules

LEAST_SIZES = 2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How much tuning is wanted."""

    sizes: int = 3
    trials: int = 18
    """Probes of a model, at most."""
    ratios: tuple[float, ...] = ()
    """D/N at which each size is tuned; by default the sweep's `tokens_per_param`."""
    spend: float | None = None
    """FLOPs of all probes, at most."""
    level: float = 0.9
    """Nominal coverage of intervals."""

    def __post_init__(self) -> None:
        if self.sizes < LEAST_SIZES:
            raise InputError(f"--sizes is {self.sizes}: a law goes through {LEAST_SIZES} at least")
        if self.trials < len(BLOCK):
            raise InputError(
                f"--trials is {self.trials}: around a recipe's rate and batch lie {len(BLOCK)}, so "
                f"give {len(BLOCK)} or more"
            )
        for ratio in self.ratios:
            if not 0 < ratio < math.inf:
                raise InputError(
                    f"--tokens-per-param is {ratio:g}; it must be finite and above 0, such as 20"
                )


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What tuning came to."""

    plan: Plan
    """What was probed."""
    measured: int
    """Probes with a row in the ledger."""
    trained: int
    """Of these, now."""
    end: End
    made: TunedRecipe | None = None
    """None where probes are missing, or tell no recipe."""
    found: tuple[TunedModel, ...] = ()
    """What the probes of each model say, where all are there."""
    refusal: str | None = None
    """Why they tell no recipe."""
    output: str | None = None
    """The sweep that was written."""
    replaced: bool = False
    """Whether another file was there."""

    @property
    def finished(self) -> bool:
        """Whether all probes that were wanted have rows, and tell a recipe."""
        return self.made is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What somebody should know before using the sweep, a sentence each."""
        made = self.made.notes if self.made else ()
        return (*made, *([f"{self.output} was another, and was replaced"] if self.replaced else ()))

    @property
    def shortfall(self) -> str:
        """Why there is no recipe, and what to do."""
        if self.refusal is not None:
            return self.refusal
        done = f"{self.measured} of {len(self.plan.planned)} probes are in the ledger"
        if self.end.overtaken:
            return f"{done}: another driver took the project over, so this one stopped"
        if self.end.interrupted:
            return f"{done}, interrupted: run the same command again to go on"
        if self.end.held:
            return f"{done}, {len(self.end.held)} held back: raise the limits of the sweep"
        return f"{done}: isoflop status says why; run the same command again to retry"


def tune(
    project: Project,
    spec: SweepSpec,
    asked: Asked,
    console: Console,
    *,
    output: str | Path,
    as_written: SweepSpec | None = None,
    address: str | None = None,
) -> Tuned:
    """Probe a sweep's recipe, fit its laws, and write the sweep with the recipe that they make.

    Parameters
    ----------
    project
        Where rows go, and come from where probes have been measured.
    spec
        The sweep, its paths absolute.
    asked
        How much tuning.
    console
        Where progress is shown.
    output
        The sweep file to write: a path or URI.
    as_written
        The sweep with paths as `output` should have them.
    address
        Of the Ray cluster to train on; None is this machine.

    Raises
    ------
    InputError
        If the recipe or the trainer cannot be tuned, or the sizes or FLOPs do not suffice.
    """
    rules(spec.recipe.name, spec.recipe.rules)  # refused now, before anything is trained
    _require_readable(_renamed(spec, spec.recipe), output)
    if reason := deaf(spec, "batch_tokens", "sequences"):
        raise InputError(f"{spec.name} cannot be tuned: {reason}")
    wanted = models(
        spec,
        make_plan(spec.model_copy(update={"probes": 0})),
        sizes=asked.sizes,
        ratios=asked.ratios or (spec.tokens_per_param,),
        trials=asked.trials,
        spend=asked.spend,
    )
    store_of(project)  # refuses what is none, before anything is written
    before = project.ledger.ids()
    with hold(project.storage, "isoflop tune", waiting=console.print) as lease:
        with Mirror(project, f"{spec.name}-tune") as tracking:
            if caution := tracking.caution():
                console.print(caution)
            probing = _Probing(project, spec, asked, wanted, lease, tracking, console)
            plan, losses, end = probing.run(address)
            left = len(missing(project, plan))
            if not end.overtaken:
                tidy(project, plan, lease.generation, end)
                tracking.conclude({}, [], ended=not left)
        if tracking.shortfall:
            console.print(tracking.shortfall)
    ids = {p.id for p in plan.planned}
    measured = ids & project.ledger.ids()
    whole = Tuned(plan=plan, measured=len(measured), trained=len(measured - before), end=end)
    if left:
        return whole
    found: list[TunedModel] = []
    try:
        for model, known in zip(wanted, losses, strict=True):
            found.append(fitted(model, known, asked.level))
        made = tuned_recipe(spec, found, asked.level)
    except InputError as error:
        return replace(whole, found=tuple(found), refusal=str(error))
    replaced = _write(as_written or spec, made, output)
    return replace(whole, found=made.found, made=made, output=str(output), replaced=replaced)


@dataclass(frozen=True)
class _Probing:
    """Rounds of probes, until what they tell is surrounded by them or enough were trained."""

    project: Project
    spec: SweepSpec
    asked: Asked
    wanted: Sequence[Model]
    lease: Lease
    tracking: Mirror
    console: Console

    def run(self, address: str | None) -> tuple[Plan, list[dict[Point, float]], End]:
        """Train them: the last plan, losses by point of each model, and how the training ended.

        Which probes a round has follows from the losses of those before it: so a call that was
        interrupted is gone on with by the same call, and goes the same way.
        """
        end = End()
        points: list[list[Point]] = [[] for _ in self.wanted]
        losses: list[dict[Point, float]] = [{} for _ in self.wanted]
        with ExitStack() as ray:
            while True:
                pairs = zip(self.wanted, losses, strict=True)
                most, level = self.asked.trials, self.asked.level
                fresh = [further_points(model, known, most, level) for model, known in pairs]
                if not any(fresh):
                    return self._plan(points), losses, end
                points = [[*old, *new] for old, new in zip(points, fresh, strict=True)]
                plan = self._plan(points)
                self._save(plan)
                if missing(self.project, plan):
                    ray.enter_context(connected(address))  # one Ray for all rounds
                    end = self._train(plan, address)
                    if missing(self.project, plan):
                        return plan, losses, end
                rounds = zip(self.wanted, points, strict=True)
                losses = [_losses(self.project, model, chosen) for model, chosen in rounds]

    def _plan(self, points: Sequence[Sequence[Point]]) -> Plan:
        return planned(f"{self.spec.name}-tune", self.spec, self.wanted, points)

    def _save(self, plan: Plan) -> None:
        """Keep a plan, with what was measured for those of its name before it."""
        ids, rows = {p.id for p in plan.planned}, self.project.ledger.ids()
        earlier = [p for old in self.project.plans() if old.name == plan.name for p in old.planned]
        kept = tuple(p for p in earlier if p.id in rows and p.id not in ids)
        told = (
            f"Probes of rate and batch for the sweep {self.spec.name}: isoflop tune planned them."
        )
        whole = replace(plan, planned=(*plan.planned, *kept))
        self.project.save_plan(whole, extend=True, told=told)

    def _train(self, plan: Plan, address: str | None) -> End:
        board = Board(plan)
        board.know(self.project.outcomes(plan), {})
        with Progress(board, self.console) as progress:
            return train(
                self.project,
                plan,
                self.lease,
                progress,
                self.tracking.finished,
                address=address,
                begun=self.tracking.start,
            )


def _losses(project: Project, model: Model, points: Sequence[Point]) -> dict[Point, float]:
    """By point, the held-out loss; infinite where the probe diverged."""
    trials: dict[Point, Trial] = {p: t for p in points if (t := model.trial(p)) is not None}
    names = {(trial.key, trial.tokens): point for point, trial in trials.items()}
    rows = project.ledger.read(set(names), ("trial", "tokens", "status", "loss")).to_pylist()
    return {
        names[row["trial"], row["tokens"]]: row["loss"] if row["status"] == "complete" else math.inf
        for row in rows
    }


def _require_readable(spec: SweepSpec, output: str | Path) -> None:
    """Refuse a sweep that could be written, but not read again."""
    try:
        parse_spec(tomllib.loads(to_toml(spec, "")), source=Path(str(output)))
    except InputError as error:
        raise InputError(
            f"the sweep that tuning would write could not be run: {error}: change that first"
        ) from error


def _renamed(spec: SweepSpec, recipe: RecipeSpec) -> SweepSpec:
    """The sweep as it is written: with another recipe, under a name of its own."""
    return spec.model_copy(update={"name": f"{spec.name}-tuned", "recipe": recipe})


def _write(spec: SweepSpec, made: TunedRecipe, output: str | Path) -> bool:
    """Write the sweep with its new recipe; whether that replaced a file with another content."""
    widths = ", ".join(str(w) for w in dict.fromkeys(item.model.shape.width for item in made.found))
    probes = sum(len(item.losses) for item in made.found)
    comment = (
        f"The sweep {spec.name} with recipe {made.recipe.name} as isoflop tune fitted it\n"
        f"to {probes} probes of width {widths}."
    )
    text = to_toml(_renamed(spec, made.recipe), comment)
    storage, name = split(output)
    replaced = storage.exists(name) and storage.read(name) != text.encode()
    write(output, text)
    return replaced
