"""The main job: plan, run, fit, propose, report, in one call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.errors import InputError
from analysis.observations import ObservationId
from analysis.study import Study
from analysis.study_json import to_json
from analysis.wording import count
from cluster.placement import cpu_slots
from orchestrator.conclusion import metrics, propose_next, write_report
from orchestrator.planner import Plan
from orchestrator.progress import Board, Progress
from orchestrator.project import Project, counts, locked, missing, observation_ids
from orchestrator.reading import Convention
from orchestrator.source import Evidence, evidence
from orchestrator.sweep import train
from orchestrator.tracking import BackgroundTracker


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of a sweep came to."""

    plan: Plan
    project: Project
    states: dict[str, int]
    """Observations by state."""
    trained: int
    """Observations measured by this call."""
    seconds: float
    """Wall time of this call."""
    training_share: float
    """Of that time, while some trial was training."""
    study: Study | None
    """None where nothing could be analysed."""
    refusal: str | None
    """Why there is no study."""
    proposal: str
    """The proposal in a sentence, or why there is none."""
    proposed: bool
    tracking_error: str | None

    @property
    def finished(self) -> bool:
        """Whether every observation was measured."""
        return self.states.get("waiting", 0) + self.states.get("failed", 0) == 0

    def to_json(self) -> dict[str, Any]:
        """The contract of `isoflop run --json`."""
        analysed = to_json(self.study) if self.study else {}
        keys = (
            *("convention", "observations", "excluded", "budgets", "vertices", "exponents"),
            *("laws", "heldout", "forecast", "warnings"),
        )
        return {
            "trials": len(self.plan.planned),
            "trained": self.trained,
            "complete": self.states.get("complete", 0),
            "diverged": self.states.get("diverged", 0),
            "failed": self.states.get("failed", 0),
            "seconds": self.seconds,
            "training_share": self.training_share,
            **{key: analysed.get(key) for key in keys},
            "refusal": self.refusal,
            "proposal": str(self.project.proposal) if self.proposed else None,
            "project": str(self.project.path),
        }


def run(project: Project, plan: Plan, console: Console, *, started: float) -> Outcome:
    """Train what is missing, then fit, propose, draw and report.

    Parameters
    ----------
    project
        Where observations go, beside those that it holds.
    plan
        What to train.
    console
        Where progress is shown.
    started
        `time.time()` when the command started.

    Raises
    ------
    InputError
        If every observation diverged.
    """
    with locked(project):
        before = set(
            observation_ids(project.ledger.read())
        )  # reads all: a damaged file ends it here
        project.save_plan(plan)
        with BackgroundTracker(project, plan) as tracking:
            board = Board(plan, cpu_slots())
            board.know(project.outcomes(plan), _losses(project, plan))
            with Progress(board, console) as progress:
                train(project, plan, progress, tracking.finished)
        return _conclude(project, plan, tracking, before, started)


def _conclude(
    project: Project,
    plan: Plan,
    tracking: BackgroundTracker,
    before: set[ObservationId],
    started: float,
) -> Outcome:
    """Fit, propose, draw, report and attach, whatever of it the ledger allows."""
    names = {p.id for p in plan.planned}
    ended = not missing(project, plan)
    study: Study | None = None
    refusal: str | None = "nothing was measured"
    proposal, proposed = "none: the sweep is not finished", False
    artifacts: list[Path] = []
    try:
        if names & project.ledger.ids():
            found = evidence(project, kind_of=plan)
            study = found.study(Convention())
            refusal = None if study.fits else next(iter(study.refusals.values()))
            if ended:
                proposal, proposed = _propose(found, project)
            chosen = project.proposal if proposed else None
            artifacts = write_report(found, study, project.report, chosen)
            artifacts += [project.report, *([chosen] if chosen else [])]
    finally:
        tracking.conclude(metrics(study) if study else {}, artifacts, ended=ended)
    fresh = (project.ledger.ids() - before) & names
    error = tracking.error
    seconds = time.time() - started
    return Outcome(
        plan=plan,
        project=project,
        states=dict(counts(project.outcomes(plan))),
        trained=len(fresh),
        seconds=seconds,
        training_share=_training_seconds(project, fresh) / seconds,
        study=study,
        refusal=refusal,
        proposal=proposal,
        proposed=proposed,
        tracking_error=f"{type(error).__name__}: {error}" if error else None,
    )


def _propose(found: Evidence, project: Project) -> tuple[str, bool]:
    try:
        chosen, plan = propose_next(found, output=project.proposal)
    except InputError as error:
        return f"none: {error}", False
    sizes = f"{len(plan.planned)} trials at {chosen.flops:.3g} FLOPs around N = "
    return f"{project.proposal.name}: {sizes}{count(chosen.centre)}, {plan.flops:.3g} in all", True


def _losses(project: Project, plan: Plan) -> dict[str, float]:
    table = project.ledger.read({p.id for p in plan.planned})
    pairs = zip(table["trial"].to_pylist(), table["loss"].to_pylist(), strict=True)
    return {key: loss for key, loss in pairs if loss is not None}


def _training_seconds(project: Project, fresh: set[tuple[str, int]]) -> float:
    """Length of the union of the fresh trials' time spans."""
    rows = project.ledger.read(fresh).select(["finished_at", "seconds"]).to_pylist()
    ends = [(row["finished_at"].timestamp(), row["seconds"]) for row in rows]
    total, covered = 0.0, float("-inf")
    for start, end in sorted((end - length, end) for end, length in ends):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
