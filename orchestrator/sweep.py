"""Plan -> Ray Tune -> ledger. Ray Tune is a disposable engine: correctness rests on the ledger."""

from __future__ import annotations

import json
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.autoscaler.sdk import request_resources
from ray.tune import FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner

from analysis.errors import InputError
from analysis.observations import ObservationId
from cluster.capacity import PACE_COLUMNS, Pace, seconds
from cluster.machines import Cluster
from cluster.placement import Unplaceable, place
from cluster.queue import Job, Queue
from cluster.simulation import simulate
from orchestrator.connection import connected, machines, prove, token_name
from orchestrator.grid import Grid
from orchestrator.lease import Lease
from orchestrator.planner import Plan
from orchestrator.progress import Progress
from orchestrator.project import Project, missing
from orchestrator.watch import Watch
from orchestrator.worker import Order, observe
from trainers.flops import trial_flops

REPORT_SECONDS = 1.0
REPORTS_PER_SECOND = 20.0
"""How often a running trial reports, and how many reports of all trials the driver takes: each
trial waits for its own to be taken."""

Finished = Callable[[ObservationId], None]
"""Told an observation's name once its row is in the ledger."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a sweep's training ended."""

    interrupted: bool = False
    held: tuple[tuple[str, str], ...] = ()
    """Keys of trials that were not started, each with the cap that held it back."""


def train(
    project: Project,
    plan: Plan,
    lease: Lease,
    progress: Progress,
    finished: Finished,
    *,
    address: str | None = None,
) -> End:
    """Train whatever `plan` asks for and the ledger lacks.

    Returns when every trial has ended or the user interrupted; the ledger knows which.

    Raises
    ------
    InputError
        If a trial fits nowhere on the cluster, a node does not see the project, nothing answers at
        `address`, or another driver took the project over.
    """
    trials = {p.trial.key: p.trial for p in missing(project, plan)}
    if not trials:
        return End()
    progress.doing("starting Ray …" if address is None else f"joining Ray at {address} …")
    with _scratch() as scratch, _quiet(scratch / "ray.log"), connected(address):
        cluster = machines()
        growing = _grow(plan, cluster) if address else cluster
        jobs = jobs_of(project, trials.values(), growing)
        token = secrets.token_hex(16)
        storage = project.storage
        storage.replace(token_name(lease.generation), token.encode())
        try:
            progress.doing("starting workers …")
            prove(storage, token, lease.generation)
            limits = plan.spec.limits
            slots = limits.slots
            queue = Queue(
                jobs,
                cluster,
                order=simulate(jobs, growing, slots=slots).order,
                slots=slots,
                caps=limits.caps(plan.spec.cluster.price_per_gpu_hour, datetime.now(UTC)),
            )
            progress.board.slots = _slots(jobs, growing, slots)
            orders = {
                job.key: Order(
                    trial=trials[job.key],
                    project=storage.uri,
                    generation=lease.generation,
                    token=token,
                    scratch=str(scratch / job.key),
                    ranks=max(1, int(job.placement.gpus)),
                    report_seconds=max(REPORT_SECONDS, progress.board.slots / REPORTS_PER_SECOND),
                    silent_seconds=limits.silent_seconds,
                    checkpoints=plan.spec.checkpoints,
                )
                for job in jobs
            }
            started = time.monotonic()
            grid = Grid(
                queue,
                orders,
                limits=limits,
                cluster=machines,
                clock=lambda: time.monotonic() - started,
            )
            watch = Watch(project, trials, lease, grid, progress, finished, limits)
            with _interrupts(watch):
                _tune(grid, watch, scratch)
        finally:
            storage.remove(token_name(lease.generation))
    if lease.lost.is_set():
        raise InputError(
            f"another driver took {project.uri} over, so this one stopped; what it measured is kept"
        )
    return End(interrupted=watch.interrupted, held=tuple(sorted(queue.held.items())))


def _grow(plan: Plan, found: Cluster) -> Cluster:
    """Ask for the machines that the spec's `[cluster]` names and that are not there yet.

    An autoscaler will start them, and a cluster without one takes no notice. Until they join,
    trials run on those `found`.
    """
    named = plan.spec.cluster.cluster()
    if named is None or len(named.nodes) <= len(found.nodes):
        return found
    request_resources(
        bundles=[{"CPU": n.cpus} | ({"GPU": n.gpus} if n.gpus else {}) for n in named.nodes]
    )
    return Cluster(nodes=(*found.nodes, *named.nodes[len(found.nodes) :]))


def jobs_of(project: Project, trials: Any, cluster: Cluster) -> list[Job]:
    """The trials as the queue sees them.

    Raises
    ------
    InputError
        If one of them fits nowhere on `cluster`.
    """
    pace = Pace.from_rows(project.ledger.read(columns=PACE_COLUMNS).to_pylist())
    jobs, refused = [], []
    for trial in trials:
        found = place(trial, cluster)
        if isinstance(found, Unplaceable):
            refused.append(str(found))
            continue
        jobs.append(
            Job(
                key=trial.key,
                placement=found,
                seconds=seconds(trial, found, cluster, pace),
                flops=trial_flops(trial),
            )
        )
    if refused:
        more = f"; so do {len(refused) - 1} more (isoflop plan lists them)" if refused[1:] else ""
        raise InputError(f"{refused[0]}{more}")
    return jobs


def _slots(jobs: list[Job], cluster: Cluster, most: int | None) -> int:
    """Trials that run at once, about: for the time that is left and the pace of reports."""
    widths = [job.placement.gpus or 1.0 for job in jobs]
    room = cluster.gpus if any(job.placement.gpus for job in jobs) else cluster.cpus
    fit = max(1, int(room / (sum(widths) / len(widths))))
    return min(fit, most or fit)


def _tune(grid: Grid, watch: Watch, scratch: Path) -> None:
    """Run Ray Tune until the grid is done."""
    tuner = Tuner(
        tune.with_resources(observe, _placement),
        tune_config=TuneConfig(
            search_alg=grid,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            storage_path=str(scratch / "tune"),
            verbose=0,
            failure_config=FailureConfig(max_failures=0),
            callbacks=[watch],
        ),
    )
    tuner.fit()


def _placement(config: dict[str, Any]) -> PlacementGroupFactory:
    asked = json.loads(config["placement"])
    return PlacementGroupFactory(asked["bundles"], strategy=asked["strategy"])


@contextmanager
def _interrupts(watch: Watch) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets trials write their checkpoints, the second ends it now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # Only a flag: the interrupted code may hold any lock.
        if watch.interrupted:
            watch.quit()
        watch.interrupted = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for Tune's state and the trials' files, gone when the sweep ends."""
    with tempfile.TemporaryDirectory(prefix="isoflop-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what Ray prints in this process, such as news of dead workers, to a file.

    What a person should know of it is in the board and in attempts/; the console that shows the
    board holds the real stream.
    """
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        yield
