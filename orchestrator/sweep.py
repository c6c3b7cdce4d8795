"""Plan -> Ray Tune -> ledger. Ray Tune is a disposable engine: correctness rests on the ledger."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler
from ray.util.placement_group import placement_group

from analysis.errors import InputError
from analysis.observations import ObservationId, observation_ids
from cluster.budget import HOUR, Caps
from cluster.machines import Cluster, as_told, unknown_types
from cluster.pace import CPU, PACE_COLUMNS, Pace, split_device
from cluster.placement import Unplaceable, place
from cluster.queue import Job, Queue
from orchestrator.checkpoints import directory_of
from orchestrator.connection import address_of, connected, group_gone, machines
from orchestrator.gpu_checks import use_of
from orchestrator.gpu_reports import PATIENCE_SECONDS, GpuReports
from orchestrator.grid import Grid
from orchestrator.growth import announced, wish
from orchestrator.layout import lay_out
from orchestrator.lease import Lease
from orchestrator.order import Order
from orchestrator.planner import Plan
from orchestrator.progress import Progress
from orchestrator.project import Project, missing
from orchestrator.proof import forget_drivers_before, nonce_name, prove_gpus, prove_nodes
from orchestrator.propagation import keep_secrets_here
from orchestrator.scratch import scratch
from orchestrator.stop import Stop, interruptible
from orchestrator.stopped import forget_stopped, note_stopped
from orchestrator.watch import Over, Watch, quit_now
from orchestrator.worker import observe
from trainers.command import require_variables
from trainers.trial import Trial

SHOWN = 3
"""Trials that do not fit, named one by one."""
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
    overtaken: bool = False
    """Whether another driver has taken the project over."""
    held: tuple[tuple[str, str], ...] = ()
    """Keys of trials that were not started, each with the cap that held it back."""
    not_started: tuple[str, ...] = ()
    """Keys of trials that were not started because the first ones all failed alike."""
    common_reason: str | None = None
    """Why those failed."""


def train(
    project: Project,
    plan: Plan,
    lease: Lease,
    progress: Progress,
    finished: Finished,
    *,
    address: str | None = None,
    begun: Callable[[], None] = lambda: None,
) -> End:
    """Train whatever `plan` asks for and the ledger lacks; `begun` is called when a trial starts.

    Returns when every trial has ended or the user interrupted; the ledger knows which.

    Raises
    ------
    InputError
        If a trial fits nowhere on the cluster, a node does not see the project, or nothing answers
        at `address`.
    """
    left: dict[str, set[int]] = {}
    lacking = missing(project, plan)
    for key, tokens in (p.id for p in lacking):
        left.setdefault(key, set()).add(tokens)
    trials = {t.key: t.only(left[t.key]) for t in plan.trials if t.key in left}
    with suppress(OSError):
        forget_stopped(project.storage, plan.name)
    if not trials:
        return End()
    if address is None:  # what trials inherit there is this process's environment
        for command in {trial.command for trial in trials.values() if trial.command}:
            require_variables(command)
    progress.doing("starting Ray …" if address is None else f"joining Ray at {address} …")
    with scratch() as directory, _quiet(directory / "ray.log"), connected(address):
        reports = GpuReports()
        work = _lay_out(project, plan, trials, reports)
        progress.joined(str(work.coming), work.slots)
        if unknown := unknown_types(work.coming):
            progress.say(unknown, style="yellow")
        gpu = plan.spec.cluster.gpu
        if gpu is not None and not any(node.gpus for node in work.coming.nodes):
            missing_gpu = (
                f"the sweep file is for {gpu} GPUs and none is here: trials train on cores"
            )
            progress.say(missing_gpu, style="yellow")
        progress.doing("starting workers …")
        if warning := keep_secrets_here():
            progress.trouble(warning)
        stop = Stop(lease)
        with _shared(project, lease) as nonce, wish(work.named) as wished:
            for line in _try_gpus(work, own=address is None):
                progress.say(line, style="dim")
            orders = _orders(project, plan, lease, nonce, work)
            grid = Grid(
                work.queue,
                orders,
                limits=plan.spec.limits,
                stop=stop,
                clock=_seconds_since(time.monotonic()),
                cluster=partial(_machines, plan, reports),
                gone=group_gone,
                grow=wished.want,
                idle=lambda: watch.look(),
                left_out=lambda node, why: progress.trouble(f"{address_of(node)} {why}"),
            )
            watch = Watch(
                project=project,
                trials=trials,
                stop=stop,
                grid=grid,
                progress=progress,
                begun=begun,
                finished=finished,
                limits=plan.spec.limits,
                measured=len(lacking) < len(plan.planned),
            )
            with interruptible(stop, lambda: quit_now(wished.forget)):
                _tune(grid, watch, directory)
            watch.record()
    for line in watch.gpus.summary():
        progress.say(line)
    reason = watch.first_failures.reason
    end = End(
        interrupted=stop.interrupted,
        overtaken=lease.lost.is_set(),
        held=tuple(sorted(work.queue.held.items())),
        not_started=() if reason is None else tuple(sorted(work.queue.kept_back)),
        common_reason=reason,
    )
    if end.not_started and reason is not None and not end.overtaken:
        with suppress(OSError):
            note_stopped(project.storage, plan.name, reason, end.not_started)
    return end


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What there is to train, and on what."""

    jobs: list[Job]
    trials: Mapping[str, Trial]
    queue: Queue
    coming: Cluster
    """The machines that there are, and those that an autoscaler will add."""
    named: Cluster | None
    """What to ask it for, if there is one."""
    slots: int
    """Trials that run at once, about."""


def _lay_out(
    project: Project, plan: Plan, trials: Mapping[str, Trial], reports: GpuReports
) -> _Work:
    """Place all trials, and choose their order, on the cluster that is connected.

    Raises
    ------
    InputError
        If one of them fits nowhere.
    """
    limits, spec = plan.spec.limits, plan.spec.cluster
    present = _machines(plan, reports, wait=PATIENCE_SECONDS)
    named = spec.cluster() if spec.autoscaling else None
    coming = present if named is None else announced(present, named)
    pace = Pace.from_rows(project.ledger.read(columns=PACE_COLUMNS).to_pylist())
    caps = _caps(project, plan, coming)
    layout = lay_out(
        trials.values(),
        coming,
        pace=pace,
        slots=limits.slots,
        caps=caps,
        adjust=partial(_left_of, project, plan, trials),
    )
    if layout.refused:
        more = len(layout.refused) - SHOWN
        rest = f", and {more} more" if more > 0 else ""
        raise InputError("; ".join(map(str, layout.refused[:SHOWN])) + rest)
    order = layout.schedule.order
    return _Work(
        jobs=layout.jobs,
        trials=trials,
        queue=Queue(layout.jobs, present, order=order, slots=limits.slots, caps=caps),
        coming=coming,
        named=named,
        slots=_slots(layout.jobs, coming, limits.slots),
    )


def _orders(
    project: Project, plan: Plan, lease: Lease, nonce: str, work: _Work
) -> dict[str, Order]:
    """What is wanted of the workers, by trial."""
    order = partial(
        Order,
        project=project.uri,
        generation=lease.generation,
        nonce=nonce,
        report_seconds=max(REPORT_SECONDS, work.slots / REPORTS_PER_SECOND),
        silent_seconds=plan.spec.limits.silent_seconds,
        checkpoints=plan.spec.checkpoints,
    )
    return {
        job.key: order(
            trial=work.trials[job.key],
            ranks=max(1, int(job.placement.gpus)),
            gpus=job.placement.gpus,
            mps=work.coming.shares_by_mps(job.placement.gpu_type),
        )
        for job in work.jobs
    }


def _try_gpus(work: _Work, *, own: bool) -> list[str]:
    """Have nodes try the GPUs that the trials are to run on; return what a person should know.

    Raises
    ------
    InputError
        If no node's GPUs work.
    """
    uses = {use_of(work.trials[job.key].trainer) for job in work.jobs if job.placement.gpus}
    tried = [use for use in uses if use is not None]
    return [line for use in sorted(tried) for line in prove_gpus(use, own=own)]


def _machines(plan: Plan, reports: GpuReports, *, wait: float = 0.0) -> Cluster:
    """The nodes that there are, now."""
    spec = plan.spec.cluster
    return as_told(machines(reports, wait=wait), spec.gpu, spec.gpu_bytes)


def _seconds_since(started: float) -> Callable[[], float]:
    return lambda: time.monotonic() - started


@contextmanager
def _shared(project: Project, lease: Lease) -> Iterator[str]:
    """A nonce in the project, by which every node proves that it sees it."""
    nonce, name = secrets.token_hex(16), nonce_name(lease.generation)
    project.storage.replace(name, nonce.encode())
    try:
        with suppress(OSError):
            forget_drivers_before(project.storage, lease.generation)
        prove_nodes(project.storage, nonce, lease.generation)
        yield nonce
    finally:
        with suppress(OSError):
            project.storage.remove(name)


def _caps(project: Project, plan: Plan, cluster: Cluster) -> Caps:
    """What earlier runs of the plan have left of its caps."""
    caps = plan.spec.limits.caps(plan.spec.cluster.price_per_gpu_hour, datetime.now(UTC))
    if caps.flops is caps.gpu_hours is caps.money is None:
        return caps
    trials = {p.id: p.trial for p in plan.planned}
    table = project.ledger.read(set(trials), ("trial", *PACE_COLUMNS))
    flops = hours = 0.0
    for name, row in zip(observation_ids(table), table.to_pylist(), strict=True):
        flops += row["flops_spent"]
        took = row["seconds"] + (row.get("compile_seconds") or 0.0)
        hours += took / HOUR * _gpus_of(trials[name], row["device"], cluster)
    price = caps.price_per_gpu_hour or 0.0
    return replace(
        caps,
        flops=None if caps.flops is None else max(0.0, caps.flops - flops),
        gpu_hours=None if caps.gpu_hours is None else max(0.0, caps.gpu_hours - hours),
        money=None if caps.money is None else max(0.0, caps.money - hours * price),
    )


def _gpus_of(trial: Trial, device: str, cluster: Cluster) -> float:
    """GPUs that a trial was measured on, by its row; of other programs, as many as it asks for."""
    if trial.trainer == "pretrain":
        return 0.0 if CPU in device else split_device(device)[0]
    placed = place(trial, cluster)
    return 0.0 if isinstance(placed, Unplaceable) else placed.gpus


def _left_of(
    project: Project, plan: Plan, trials: Mapping[str, Trial], jobs: list[Job]
) -> list[Job]:
    """The jobs, each with what is left of its trial to do."""
    planned = {trial.key: trial for trial in plan.trials}
    shares = {job.key: _share(project, planned[job.key], trials[job.key]) for job in jobs}
    return [
        replace(job, seconds=job.seconds * shares[job.key], flops=job.flops * shares[job.key])
        for job in jobs
    ]


def _share(project: Project, planned: Trial, left: Trial) -> float:
    """What a trunk's last horizons take beyond those measured, over what they take alone."""
    measured = [tokens for tokens in planned.measured_at if tokens not in left.measured_at]
    if not measured or left.measured_at[0] < measured[-1]:
        return 1.0
    if not project.storage.names(directory_of(planned.key)):
        return 1.0  # there is nothing to go on from
    marginal = planned.marginal_steps
    return sum(marginal[tokens] for tokens in left.measured_at) / left.total_steps


def _slots(jobs: list[Job], cluster: Cluster, most: int | None) -> int:
    """Trials that run at once, about: for the time that is left and the pace of reports."""
    widths = [job.placement.gpus or job.placement.cpus for job in jobs]
    room = cluster.gpus if any(job.placement.gpus for job in jobs) else cluster.cpus
    fit = max(1, int(room / (sum(widths) / len(widths))))
    return min(fit, most or fit)


def _tune(grid: Grid, watch: Watch, directory: Path) -> None:
    """Run Ray Tune until the grid is done."""
    tuner = Tuner(
        tune.with_resources(observe, _placement),
        tune_config=TuneConfig(
            search_alg=grid,
            scheduler=_Frugal(),  # type: ignore[no-untyped-call] # Ray leaves it so
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            storage_path=str(directory / "tune"),
            verbose=0,
            failure_config=FailureConfig(max_failures=0),
            callbacks=[watch],
            stop=Over(watch),
        ),
    )
    tuner.fit()


class _Frugal(FIFOScheduler):
    """Has Tune end an actor that no trial takes over, rather than keep one on its GPUs in case."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial is handed out."""
        tune_controller._actor_cache._may_keep_one = False  # Tune has no setting for it


class _Aimed(PlacementGroupFactory):
    """Asks Ray for the node where the queue has room, so that it stays as the queue thinks.

    Left to itself Ray spreads small groups over the nodes, and a wide one waits for all of them.
    Only those of one line are equal, which is to Tune: may use each other's actors.
    """

    def __init__(
        self, bundles: list[dict[str, float]], strategy: str, node: str | None, line: str
    ) -> None:
        super().__init__(bundles, strategy=strategy)
        self._node, self._line = node, line

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aimed) and other._line == self._line

    def __hash__(self) -> int:
        return hash(self._line)

    def to_placement_group(self) -> Any:
        """Make the group. Ray takes the hint for groups on one node only."""
        hint = self._node if self.strategy == "STRICT_PACK" else None
        return placement_group(self.bundles, self.strategy, _soft_target_node_id=hint)


def _placement(config: dict[str, Any]) -> PlacementGroupFactory:
    return _Aimed(**json.loads(config["placement"]))


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what Ray prints in this process, such as news of dead workers, to a file.

    What a person should know of it is in the board and in attempts/; the console that shows the
    board holds the real stream.
    """
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        yield
