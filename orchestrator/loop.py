"""The main job: plan, run, fit, propose, report, in one call."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.errors import InputError
from analysis.observations import ObservationId, observation_ids
from analysis.study import Study
from analysis.study_json import to_json
from analysis.wording import count
from cluster.machines import cpu_slots
from orchestrator import checkpoints
from orchestrator.conclusion import metrics, propose_next, write_report
from orchestrator.lease import hold
from orchestrator.mirror import NO_STORE, Mirror
from orchestrator.planner import Plan
from orchestrator.progress import Board, Progress
from orchestrator.project import Drafts, Project, counts, missing
from orchestrator.reading import Convention
from orchestrator.source import Evidence, evidence
from orchestrator.sweep import End, train


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
    end: End
    """How the training ended."""

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
            "held_back": dict(self.end.held),
            "seconds": self.seconds,
            "training_share": self.training_share,
            **{key: analysed.get(key) for key in keys},
            "refusal": self.refusal,
            "proposal": self.project.proposal if self.proposed else None,
            "project": self.project.uri,
        }


def run(
    project: Project,
    plan: Plan,
    console: Console,
    *,
    started: float,
    address: str | None = None,
    tracking_uri: str | None = None,
    extend: bool = False,
) -> Outcome:
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
    address
        Of the Ray cluster to train on; None is this machine.
    tracking_uri
        MLflow's store; None is the one beside a local project.
    extend
        Whether the plan may add to one of the same name.

    Raises
    ------
    InputError
        If every observation diverged, the plan is at odds with the project, or the cluster cannot
        train it.
    """
    with hold(project.storage, "isoflop run", waiting=console.print) as lease:
        # Reads all rows: a damaged file ends it here.
        before = set(observation_ids(project.ledger.read()))
        with suppress(OSError):
            project.ledger.compact_if_worthwhile()
        project.save_plan(plan, extend=extend)
        with Mirror(project, plan, tracking_uri=tracking_uri) as tracking:
            board = Board(plan, cpu_slots())
            board.know(project.outcomes(plan), _losses(project, plan))
            if tracking.store is None:
                console.print(NO_STORE)
            with Progress(board, console) as progress:
                end = train(project, plan, lease, progress, tracking.finished, address=address)
            _tidy(project, plan)
            with project.drafts() as drafts:
                return _conclude(project, plan, tracking, before, started, drafts, end)


def _tidy(project: Project, plan: Plan) -> None:
    """Remove what the training needed no longer: storage that fails now may keep it."""
    with suppress(OSError):
        project.attempts.forget(project.ledger.ids())
        if plan.spec.checkpoints.after == "remove" and not missing(project, plan):
            checkpoints.remove(project.storage, (trial.key for trial in plan.trials))
        project.ledger.compact_if_worthwhile()


def _conclude(
    project: Project,
    plan: Plan,
    tracking: Mirror,
    before: set[ObservationId],
    started: float,
    drafts: Drafts,
    end: End,
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
                proposal, proposed = _propose(found, drafts)
            text = drafts.proposal.read_text() if proposed else None
            pictures = drafts.figures
            artifacts = write_report(found, study, drafts.report, text, pictures=pictures)
            artifacts += [drafts.report, *([drafts.proposal] if proposed else [])]
    finally:
        tracking.conclude(metrics(study) if study else {}, artifacts, ended=ended)
    fresh = (project.ledger.ids() - before) & names
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
        tracking_error=tracking.shortfall,
        end=end,
    )


def _propose(found: Evidence, drafts: Drafts) -> tuple[str, bool]:
    try:
        chosen, plan = propose_next(found, output=drafts.proposal)
    except InputError as error:
        return f"none: {error}", False
    sizes = f"{len(plan.planned)} trials at {chosen.flops:.3g} FLOPs around N = "
    return f"{drafts.proposal.name}: {sizes}{count(chosen.centre)}, {plan.flops:.3g} in all", True


def _losses(project: Project, plan: Plan) -> dict[str, float]:
    table = project.ledger.read({p.id for p in plan.planned}, ("trial", "loss"))
    pairs = zip(table["trial"].to_pylist(), table["loss"].to_pylist(), strict=True)
    return {key: loss for key, loss in pairs if loss is not None}


def _training_seconds(project: Project, fresh: set[tuple[str, int]]) -> float:
    """Length of the union of the fresh trials' time spans."""
    rows = project.ledger.read(fresh, ("finished_at", "seconds")).to_pylist()
    ends = [(row["finished_at"].timestamp(), row["seconds"]) for row in rows]
    total, covered = 0.0, float("-inf")
    for start, end in sorted((end - length, end) for end, length in ends):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
