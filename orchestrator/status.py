"""What goes on in a project, read from its storage alone: from any machine that sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from analysis.errors import InputError
from analysis.rungs import COLUMNS, Rung, rungs, rungs_json, undertuned, verdict
from orchestrator.attempts import Attempt
from orchestrator.bad_gpus import held_gpus
from orchestrator.exclusion import FILE, SELECTORS, read_exclusions, rule_out
from orchestrator.external import external_counts
from orchestrator.lease import LeaseRecord
from orchestrator.planner import Plan, Planned
from orchestrator.project import Activity, Project, counts
from orchestrator.records import LeftOut, number_in
from orchestrator.stopped import Stopped, read_stopped
from orchestrator.tables import clock, plain_table

STATES = ("complete", "diverged", "failed", "running", "waiting")
SHOWN = 20
"""Running trials, and attempts that are over, that a person is shown; JSON has all."""
MEND = "mend what made them fail and run the same sweep again"
LEFT = "its driver is gone: the next run goes on from its newest checkpoint"


@dataclass(frozen=True, kw_only=True)
class Status:
    """A project at one moment."""

    project: str
    """Its URI."""
    plans: Mapping[str, Mapping[str, int]]
    """By plan, how many observations are in which state."""
    external: Mapping[str, int]
    """By set of external runs, how many."""
    activity: Activity
    planned: Mapping[str, Planned]
    """By trial."""
    rungs: tuple[Rung, ...] = ()
    """Observations that were probed at other learning rates."""
    stopped: tuple[Stopped, ...] = ()
    """Plans whose last run did not start all of its trials, since the first all failed alike."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that could not be used."""

    def progress(self, attempt: Attempt) -> tuple[float | None, float | None]:
        """Share of a running trial's steps done, and its training loss, at the last beat."""
        driver = self.activity.driver
        running = driver.note.get("running") if driver else None
        told = running.get(attempt.trial) if isinstance(running, Mapping) else None
        return number_in(told, "fraction"), number_in(told, "loss")

    def to_json(self) -> dict[str, Any]:
        """The contract of `isoflop status --json`."""
        return {
            "project": self.project,
            "driver": _driver(self.activity.driver),
            "plans": [{"name": k, **{s: v[s] for s in STATES}} for k, v in self.plans.items()],
            "external": [{"name": k, "complete": n} for k, n in self.external.items()],
            "rungs": rungs_json(self.rungs),
            "not_started": [asdict(item) for item in self.stopped],
            "left_out": [asdict(item) for item in self.left_out],
            "running": [self._running(attempt) for attempt in self.activity.running],
            "attempts_without_row": [
                {k: v for k, v in asdict(a).items() if k not in ("traceback", "log", "id")}
                for a in self.activity.over
            ],
        }

    def _running(self, attempt: Attempt) -> dict[str, Any]:
        fraction, loss = self.progress(attempt)
        where = {name: getattr(attempt, name) for name in ("number", "node", "started_at")}
        return {"trial": attempt.trial, **where, "fraction": fraction, "train_loss": loss}


def status(project: Project) -> Status:
    """Read what a project's storage says."""
    (plans, odd_plans), activity = project.survey_plans(), project.activity()
    columns = ("trial", "tokens", "status", "trainer", "corpus")
    rows = project.ledger.survey(columns=columns)
    stopped, odd_stopped = read_stopped(project.storage, [plan.name for plan in plans])
    probed, odd_exclusions = _rungs(project, plans)
    return Status(
        project=project.uri,
        plans={plan.name: counts(project.outcomes(plan, activity, rows.table)) for plan in plans},
        external=external_counts(rows.table, plans),
        activity=activity,
        planned={p.trial.key: p for plan in plans for p in plan.planned},
        rungs=probed,
        stopped=stopped,
        left_out=(
            *rows.left_out,
            *odd_plans,
            *activity.left_out,
            *odd_stopped,
            *odd_exclusions,
        ),
    )


def _rungs(project: Project, plans: Sequence[Plan]) -> tuple[tuple[Rung, ...], list[LeftOut]]:
    """What probes say of the plans' rates, and exclusions that cannot be read.

    The ledger is read where there are any probes.
    """
    left_out = []
    try:
        exclusions = read_exclusions(project.storage)
    except InputError as error:
        exclusions = ()
        left_out.append(LeftOut(file=FILE, reason=str(error)))
    asked = [p for plan in plans for p in plan.planned]
    if not any(p.role == "probe" for p in asked):
        return (), left_out
    columns = [*dict.fromkeys((*COLUMNS, *SELECTORS))]
    every = project.ledger.survey({p.id for p in asked}, columns).table
    table, *_ = rule_out(every, exclusions)
    return rungs(table, table), left_out


def show_status(console: Console, found: Status) -> None:
    """Plans and how far they are; who works on them; what runs; what went wrong."""
    table = plain_table("plan", "observations", *STATES)
    for name, states in found.plans.items():
        numbers = (str(states[state]) for state in STATES)
        table.add_row(name, str(sum(states.values())), *numbers)
    for name, n in found.external.items():
        table.add_row(f"{name} (external)", str(n), str(n), *("–" for _ in STATES[1:]))
    console.print(table)
    console.print()
    for said in undertuned(found.rungs):
        console.print(Text(f"! {said}", style="yellow"))
    if held := verdict(found.rungs):
        console.print(Text(held, style="dim"))
    for item in found.stopped:
        n = len(item.trials)
        which = (
            f"{n} trial{'s' * (n != 1)} of {item.plan} {'were' if n != 1 else 'was'} not started"
        )
        text = f"! {which}, since the first ones all failed alike ({item.reason}): {MEND}"
        console.print(Text(text, style="yellow"))
    for odd in found.left_out[:SHOWN]:
        console.print(Text(f"! {odd}", style="yellow"))
    if len(found.left_out) > SHOWN:
        console.print(f"… {SHOWN} of {len(found.left_out)} left out; --json has all", style="dim")
    console.print(_who(found.activity.driver))
    for gpu in held_gpus(found.activity.driver.note if found.activity.driver else {}):
        console.print(Text(f"! {gpu}", style="yellow"))
    if found.activity.running:
        console.print(_runs(found))
    if found.activity.over:
        _show_attempts(console, found)


def _runs(found: Status) -> Any:
    table = plain_table(
        "running trial", "C, FLOPs", "width", "done", "train loss", "for", "on", "attempt"
    )
    for attempt in found.activity.running[:SHOWN]:
        planned = found.planned.get(attempt.trial)
        fraction, loss = found.progress(attempt)
        table.add_row(
            attempt.trial,
            *_size(planned),
            "–" if fraction is None else f"{fraction:.0%}",
            "–" if loss is None else f"{loss:.4f}",
            clock(_seconds_since(attempt.started_at)),
            attempt.node,
            str(attempt.number),
        )
    return table


def _size(planned: Planned | None) -> tuple[str, str]:
    """Nominal budget and width of a trial; dashes where no plan asks for it any more."""
    if planned is None:
        return "–", "–"
    return f"{planned.budget:.3g}", str(planned.trial.shape.width)


def _show_attempts(console: Console, found: Status) -> None:
    """The latest attempts without a row that run no more, a line each."""
    over = sorted(found.activity.over, key=lambda a: a.ended_at or a.started_at)
    console.print()
    table = plain_table("attempt without a row", "", "C, FLOPs", "width", "where", "why")
    for a in over[-SHOWN:]:
        step = "" if a.step is None else f", at step {a.step:,}"
        where = f"{(a.ended_at or a.started_at)[:16].replace('T', ' ')} UTC {a.node}"
        why = Text(LEFT if a.open else f"{a.error}{step}")
        budget, width = _size(found.planned.get(a.trial))
        table.add_row(f"{a.trial} {a.number}", a.kind or "left", budget, width, where, why)
    console.print(table)
    if len(over) > SHOWN:
        console.print(f"… the latest {SHOWN} of {len(over)}; --json has all", style="dim")
    console.print(f"tracebacks and logs: {found.project}/attempts/", style="dim")


def _who(driver: LeaseRecord | None) -> str:
    if driver is None:
        return "nobody is running a sweep in it"
    stopping = ", stopping" if driver.note.get("stopping") else ""
    heard = _seconds_since(driver.beat_at or driver.since)
    return f"driven by {driver.holder}{stopping}; last sign of life {max(0.0, heard):.0f} s ago"


def _driver(driver: LeaseRecord | None) -> dict[str, Any] | None:
    if driver is None:
        return None
    names = ("host", "pid", "purpose", "since", "beat_at")
    return {name: getattr(driver, name) for name in names} | {
        "stopping": bool(driver.note.get("stopping"))
    }


def _seconds_since(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
