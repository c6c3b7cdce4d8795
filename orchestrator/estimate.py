"""What a plan takes on a cluster: placements, time, money, makespan. Trains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cluster.budget import HOUR
from cluster.capacity import mfu, times
from cluster.machines import Cluster, this_machine, unknown_types
from cluster.pace import PACE_COLUMNS, Pace
from cluster.placement import Placement, Unplaceable
from cluster.queue import Job
from cluster.simulation import Schedule
from orchestrator.family import corpus_caution
from orchestrator.layout import Sharing, lay_out
from orchestrator.planner import Plan
from orchestrator.probes import cautions_json, probe_cost
from orchestrator.project import directory_for, is_project, open_project
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import open_storage
from trainers.flops import params
from trainers.trial import Precision, Trial

CHECKPOINT_BYTES_PER_PARAM = 12
"""fp32: the weight and the optimiser's two moments."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One trial of a plan and where it is expected to run."""

    trial: Trial
    job: Job
    """The trial as the queue sees it."""
    mfu: float | None
    """Share of its GPUs' peak in its precision while it trains; None on a core."""
    compile_seconds: float
    """Seconds, of those that it takes, before it trains; 0 on a core."""

    @property
    def placement(self) -> Placement:
        """Its class."""
        return self.job.placement

    @property
    def seconds(self) -> float:
        """Seconds that it is expected to take."""
        return self.job.seconds


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work, time, money and disk that trials take."""

    flops: float
    """Exact."""
    gpu_hours: float
    core_hours: float
    """Core-hours of the trials on cores."""
    money: float | None
    """What the GPU-hours cost; None where no price is told."""
    checkpoint_bytes: float
    """Bytes on disk once every trial that writes checkpoints has as many as are kept."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan on a cluster."""

    plan: Plan
    cluster: Cluster
    asked: bool
    """Whether somebody named the cluster; else it is this machine's cores."""
    measured: bool
    """Whether times rest on trials of the ledger."""
    placed: dict[str, Placed]
    """Trial's key -> where it is expected to run."""
    unplaceable: tuple[Unplaceable, ...]
    schedule: Schedule
    """Schedule that keeps the spec's caps."""
    sharing: Sharing | None
    """What shares of GPUs save, or would; None where no trial would share one by choice."""
    with_mps: Sharing | None
    """What they would save if MPS ran on the nodes; None where it does, or that saves nothing."""

    @property
    def precision(self) -> Precision:
        """Precision in which its trials are trained: a recipe has one."""
        return self.plan.planned[0].trial.hyperparameters.precision

    @cached_property
    def cost(self) -> Cost:
        """Cost of the trials that are started within the limits."""
        held = self.schedule.held
        return self._of(item for key, item in self.placed.items() if key not in held)

    @cached_property
    def unlimited(self) -> Cost:
        """Cost of every trial that fits."""
        return self._of(self.placed.values())

    def _of(self, items: Iterable[Placed]) -> Cost:
        items, spec = list(items), self.plan.spec
        hours = sum(item.job.gpu_seconds for item in items) / HOUR
        price = spec.cluster.price_per_gpu_hour
        per_param = CHECKPOINT_BYTES_PER_PARAM * spec.checkpoints.keep
        writing = [item.trial for item in items if _writes(item, spec.checkpoints)]
        return Cost(
            flops=sum(item.job.flops for item in items),
            gpu_hours=hours,
            core_hours=sum(item.seconds for item in items if not item.placement.gpus) / HOUR,
            money=None if price is None else hours * price,
            checkpoint_bytes=sum(per_param * params(trial.shape).total for trial in writing),
        )

    def to_json(self) -> dict[str, Any]:
        """The contract of `isoflop plan --json`."""
        schedule, summary, cost = self.schedule, self.plan.summary(), self.cost
        refused = {item.trial.key: item for item in self.unplaceable}
        for row in summary["trials"]:
            row["placement"] = self._placement_json(row["key"])
            row["unplaceable"] = str(refused[row["key"]]) if row["key"] in refused else None
        return summary | {
            "cluster": {
                "nodes": len(self.cluster.nodes),
                "gpus": self.cluster.gpus,
                "cpus": self.cluster.cpus,
                "description": str(self.cluster),
            },
            "measured": self.measured,
            "precision": self.precision,
            "classes": class_counts(self.placed.values()),
            "gpu_hours": cost.gpu_hours,
            "core_hours": cost.core_hours,
            "money": cost.money,
            "without_limits": asdict(self.unlimited),
            "makespan_seconds": schedule.makespan,
            "bound_seconds": schedule.bound,
            "idle": schedule.idle,
            "order": schedule.order,
            "checkpoint_bytes": cost.checkpoint_bytes,
            "held_back": schedule.held,
            "unplaceable": [str(item) for item in self.unplaceable],
            "sharing": None if self.sharing is None else asdict(self.sharing),
            "sharing_with_mps": None if self.with_mps is None else asdict(self.with_mps),
            "unknown_gpus": unknown_types(self.cluster),
            "probes": asdict(probe_cost(self.plan)),
            "cautions": cautions_json(self.plan),
            "corpus_caution": corpus_caution(self.plan.spec),
        }

    def _placement_json(self, key: str) -> dict[str, Any] | None:
        item = self.placed.get(key)
        if item is None:
            return None
        where = item.placement
        return {
            "class": where.label,
            "gpus": where.gpus,
            "nodes": where.nodes,
            "bytes": where.bytes,
            "seconds": item.seconds,
            "compile_seconds": item.compile_seconds,
            "mfu": item.mfu,
            "held_back": self.schedule.held.get(key),
        }


def estimate(plan: Plan, cluster: Cluster | None = None, pace: Pace | None = None) -> Estimate:
    """Place a plan on `cluster` (default: its spec's, else this machine's cores) and time it."""
    spec = plan.spec
    asked = cluster or spec.cluster.cluster()
    there, pace = asked or this_machine(), pace or Pace()
    laid_out = partial(
        lay_out,
        plan.trials,
        pace=pace,
        slots=spec.limits.slots,
        caps=spec.limits.caps(spec.cluster.price_per_gpu_hour, datetime.now(UTC)),
    )
    layout = laid_out(there)
    may_share = any(trial.trainer == "pretrain" for trial in plan.trials)
    has_mps = there.shares_by_mps(None)
    with_mps = laid_out(there.with_mps).sharing if may_share and not has_mps else None
    trials = {trial.key: trial for trial in plan.trials}
    placed = {}
    for job in layout.jobs:
        trial = trials[job.key]
        placed[job.key] = Placed(
            trial=trial,
            job=job,
            mfu=mfu(trial, job.placement, there, pace) or None,
            compile_seconds=times(trial, job.placement, there, pace).compiling,
        )
    return Estimate(
        plan=plan,
        cluster=there,
        asked=asked is not None,
        measured=bool(pace.measured),
        placed=placed,
        unplaceable=tuple(layout.refused),
        schedule=layout.schedule,
        sharing=layout.sharing,
        with_mps=with_mps if with_mps and with_mps.used else None,
    )


def class_counts(placed: Iterable[Placed]) -> dict[str, int]:
    """Return the number of trials of each class, the smallest class first."""
    placed = sorted(placed, key=lambda item: item.placement.size)
    return dict(Counter(item.placement.label for item in placed))


def measured_pace(sweep_file: str | Path, name: str, project: str | Path | None) -> Pace:
    """Return the pace of the ledger of `project`, by default of the one the sweep would use.

    Nothing is known where there is no such project yet.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    where = project or directory_for(sweep_file, name)
    if not is_project(open_storage(where)):
        return Pace()
    rows = open_project(where).ledger.survey(columns=PACE_COLUMNS)
    return Pace.from_rows(rows.table.to_pylist())


def _writes(item: Placed, checkpoints: Checkpoints) -> bool:
    """Whether a trial lasts until its first checkpoint."""
    if item.trial.trainer == "simulated":
        return False  # a few bytes
    by_time, by_step = checkpoints.every_seconds, checkpoints.every_steps
    long = by_time is not None and item.seconds >= by_time
    return long or (by_step is not None and item.trial.hyperparameters.steps >= by_step)
