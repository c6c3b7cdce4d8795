"""The main job: plan, run, fit, propose, report, in one call."""

from __future__ import annotations

import time
from collections import Counter
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
from orchestrator import checkpoints
from orchestrator.conclusion import metrics, propose_next, write_pictures, write_report
from orchestrator.lease import hold
from orchestrator.mirror import Mirror
from orchestrator.options import INTERRUPTED
from orchestrator.planner import Plan
from orchestrator.progress import Board, Progress
from orchestrator.project import Drafts, Project, counts, missing
from orchestrator.reading import Convention
from orchestrator.source import Evidence, evidence
from orchestrator.sweep import End, train
from orchestrator.tracking import store_of

NOTHING, UNFINISHED = "nothing was measured", "none: the sweep is not finished"


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
        measured = self.states.get("complete", 0) + self.states.get("diverged", 0)
        return measured == len(self.plan.planned)

    @property
    def shortfall(self) -> str:
        """Why not every observation was measured, and what to do."""
        done = self.states.get("complete", 0) + self.states.get("diverged", 0)
        failed, held = self.states.get("failed", 0), Counter(cap for _, cap in self.end.held)
        parts = [f"{done} of {len(self.plan.planned)} observations are in the ledger"]
        parts += [f"{failed} failed (isoflop status {self.project.uri} says why)"] if failed else []
        parts += [f"{n} held back by limits.{cap}" for cap, n in sorted(held.items())]
        if self.end.not_started:
            parts.append(
                f"{len(self.end.not_started)} not started, since the first trials all failed alike "
                f"({self.end.common_reason})"
            )
        if self.end.overtaken:
            return f"{', '.join(parts)}: another driver took the project over, so this one stopped"
        if self.end.interrupted:
            return f"{', '.join(parts)}, interrupted: run the same command again to go on"
        again = "run the same command again to retry"
        if self.end.not_started:
            again = "mend what made them fail and run the same command again"
        remedies = [again] if failed or not held else []
        remedies += ["raise the limit to go on"] if held else []
        return f"{', '.join(parts)}: {' or '.join(remedies)}"

    @property
    def exit_code(self) -> int:
        """Of the command: a limit that was kept is no failure."""
        if self.end.interrupted:
            return INTERRUPTED
        lacking = len(self.plan.planned) - self.states.get("complete", 0)
        lacking -= self.states.get("diverged", 0)
        return 0 if lacking == len(self.end.held) and not self.end.overtaken else 1

    def to_json(self) -> dict[str, Any]:
        """The contract of `isoflop run --json`."""
        analysed = to_json(self.study) if self.study else {}
        keys = (
            *("convention", "observations", "excluded", "budgets", "vertices", "exponents"),
            *("laws", "heldout", "forecast", "rungs", "warnings"),
        )
        return {
            "trials": len(self.plan.planned),
            "trained": self.trained,
            "complete": self.states.get("complete", 0),
            "diverged": self.states.get("diverged", 0),
            "failed": self.states.get("failed", 0),
            "interrupted": self.end.interrupted,
            "held_back": dict(self.end.held),
            "not_started": list(self.end.not_started),
            "seconds": self.seconds,
            "training_share": self.training_share,
            **{key: analysed.get(key) for key in keys},
            "refusal": self.refusal,
            "tracking_error": self.tracking_error,
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
    store_of(project, tracking_uri)  # refuses what is none, before anything is written
    with hold(project.storage, "isoflop run", waiting=console.print) as lease:
        # Reads all rows: a damaged file ends it here.
        rows = project.ledger.read()
        before = set(observation_ids(rows))
        with suppress(OSError):
            project.ledger.compact_if_worthwhile(rows)
        del rows  # curves are large
        project.save_plan(plan, extend=extend)
        with Mirror(project, plan.name, tracking_uri=tracking_uri) as tracking:
            board = Board(plan)
            board.know(project.outcomes(plan), _losses(project, plan))
            if caution := tracking.caution():
                console.print(caution)
            with Progress(board, console) as progress:
                end = train(
                    project,
                    plan,
                    lease,
                    progress,
                    tracking.finished,
                    address=address,
                    begun=tracking.start,
                )
            if end.overtaken:  # the project is another driver's now, and so is MLflow
                return _outcome(project, plan, tracking, before, started, end)
            tidy(project, plan, lease.generation, end)
            with project.drafts() as drafts:
                results = _conclude(project, plan, tracking, drafts, console)
            return _outcome(project, plan, tracking, before, started, end, *results)


def tidy(project: Project, plan: Plan, generation: int, end: End) -> None:
    """Remove what the training of a plan needs no longer: storage that fails now may keep it."""
    with suppress(OSError):
        rows, interrupted = project.ledger.ids(), end.interrupted
        project.attempts.settle(rows, driver=generation, interrupted=interrupted)
        if not missing(project, plan):
            over = (t.key for t in plan.trials if plan.spec.checkpoints.removes(t))
            checkpoints.remove(project.storage, over)
        project.ledger.compact_if_worthwhile()


def _conclude(
    project: Project, plan: Plan, tracking: Mirror, drafts: Drafts, console: Console
) -> tuple[Study | None, str | None, str, bool]:
    """Fit, propose, draw, report and attach, whatever of it the ledger allows.

    The study, or why there is none; the proposal in a sentence, and whether there is one.
    """
    ended = not missing(project, plan)
    study: Study | None = None
    refusal: str | None = NOTHING
    proposal, proposed = UNFINISHED, False
    artifacts: list[Path] = []
    try:
        if {p.id for p in plan.planned} & project.ledger.ids():
            found = evidence(project, kind_of=plan)
            study = found.study(Convention())
            refusal = None if study.fits else next(iter(study.refusals.values()))
            if ended:
                proposal, proposed = _propose(found, drafts)
            text = drafts.proposal.read_text() if proposed else None
            figures = write_report(found, study, drafts.report, text)
            artifacts += [drafts.report, *([drafts.proposal] if proposed else [])]
            try:
                artifacts += write_pictures(figures, drafts.figures)
            except (InputError, OSError) as error:
                console.print(
                    f"! no pictures are in {drafts.figures}: {error}; then isoflop report "
                    f"{project.uri} writes them",
                    style="yellow",
                )
    finally:
        tracking.conclude(metrics(study) if study else {}, artifacts, ended=ended)
    return study, refusal, proposal, proposed


def _outcome(
    project: Project,
    plan: Plan,
    tracking: Mirror,
    before: set[ObservationId],
    started: float,
    end: End,
    study: Study | None = None,
    refusal: str | None = NOTHING,
    proposal: str = UNFINISHED,
    proposed: bool = False,
) -> Outcome:
    """What it came to, by the ledger."""
    fresh = (project.ledger.ids() - before) & {p.id for p in plan.planned}
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


def _losses(project: Project, plan: Plan) -> dict[ObservationId, float]:
    table = project.ledger.read({p.id for p in plan.planned}, ("trial", "tokens", "loss"))
    pairs = zip(observation_ids(table), table["loss"].to_pylist(), strict=True)
    return {name: loss for name, loss in pairs if loss is not None}


def _training_seconds(project: Project, fresh: set[tuple[str, int]]) -> float:
    """Length of the union of the fresh trials' time spans."""
    rows = project.ledger.read(fresh, ("finished_at", "seconds")).to_pylist()
    ends = [(row["finished_at"].timestamp(), row["seconds"]) for row in rows]
    total, covered = 0.0, float("-inf")
    for start, end in sorted((end - length, end) for end, length in ends):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
