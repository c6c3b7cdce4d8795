"""Plan -> Ray Tune -> ledger. Ray Tune is a disposable engine: correctness rests on the ledger."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.search import ConcurrencyLimiter, Searcher

from cluster.placement import cpu_slots, resources
from cluster.queue import ordered
from orchestrator.ledger import WORKER_DIED, Ledger
from orchestrator.planner import Plan
from orchestrator.progress import Progress
from orchestrator.project import Project, missing
from trainers.trial import Measurement, Trial

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints boxes even when silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1e9",
}
"""Read by Ray when it starts, and inherited by its workers."""
RETRIES = 1
"""Further attempts of a trial that raised, each in a new process: the old one may be spoilt."""
RESTARTS = 4
"""Times that a trial may lose its worker: dying workers are not the trial's fault."""
REPORT_EVERY_SECONDS = 1.0
"""Between reports of a running trial: each waits for the driver."""
QUEUE_AHEAD = 4
"""Trials that Tune holds beyond those that can run, so that none waits to be asked for."""
OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store; this is near its least."""

Finished = Callable[[str], None]
"""Told a trial's key once its row is in the ledger."""


def train(project: Project, plan: Plan, progress: Progress, finished: Finished) -> None:
    """Train whatever `plan` asks for and the ledger lacks, longest first.

    Returns when every trial has ended or the user interrupted; the ledger knows which.
    """
    trials = ordered({p.trial.key: p.trial for p in missing(project, plan)}.values())
    if not trials:
        return
    since = datetime.now(UTC).isoformat()
    with _scratch() as scratch, _quiet(scratch / "ray.log"), ray_cluster():
        # Tune ends a trial for good when the actor that it hands out turns out to be dead. That is
        # not the trial's fault: it goes into a further round.
        for _ in range(1 + RESTARTS):
            lost = _tune(project, trials, scratch, since, progress, finished)
            trials = [
                trial
                for trial in trials
                if trial.key in lost and project.ledger.raised(trial.key, since=since) <= RETRIES
            ]
            if not trials:
                return
        for trial in trials:
            progress.ended(trial.key, "failed", None, None)


def _tune(
    project: Project,
    trials: list[Trial],
    scratch: Path,
    since: str,
    progress: Progress,
    finished: Finished,
) -> set[str]:
    """One run of Ray Tune over `trials`; returns the keys of those whose worker was lost.

    After an interrupt there are none: nothing is to be tried again then.
    """
    # Ray leaves this call untyped.
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = found.get("GPU", 0.0)
    slots = progress.board.slots = int(gpus or found["CPU"])
    grid = _Grid(trials, project.path, scratch, since, gpus=gpus)
    lost: set[str] = set()
    tuner = Tuner(
        tune.with_resources(_observe, _placement),
        tune_config=TuneConfig(
            search_alg=ConcurrencyLimiter(grid, max_concurrent=slots + QUEUE_AHEAD),
            num_samples=len(trials),
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            storage_path=str(scratch / "tune"),
            verbose=0,
            failure_config=FailureConfig(max_failures=RESTARTS),
            callbacks=[_Watch(project.ledger, since, progress, finished, lost)],
        ),
    )
    tuner.fit()
    return lost


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for Tune's state and the trials' workspaces, gone when the sweep ends."""
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


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The Ray that is connected already, or one of this machine for the time being, in silence."""
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT)
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ray.init(
        address="local",
        num_cpus=cpu_slots(),
        include_dashboard=False,
        logging_level=logging.CRITICAL,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        configure_logging=True,
    )
    try:
        yield
    finally:
        ray.shutdown()


class _Grid(Searcher):
    """Hands out the trials of a plan in their order."""

    def __init__(
        self, trials: list[Trial], project: Path, scratch: Path, since: str, *, gpus: float
    ) -> None:
        super().__init__()
        self._configs = [
            {
                "key": trial.key,
                "trial": json.dumps(trial.to_dict()),
                "project": str(project),
                "workspace": str(scratch / trial.key),
                "since": since,
                "resources": resources(trial, gpus=gpus),
            }
            for trial in reversed(trials)
        ]

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config, or FINISHED."""
        return self._configs.pop() if self._configs else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn: the grid is fixed."""


def _placement(config: dict[str, Any]) -> PlacementGroupFactory:
    return PlacementGroupFactory([config["resources"]])


def _observe(config: dict[str, Any]) -> None:
    """Train one trial in a Ray worker. Its row is in the ledger before anybody is told."""
    from trainers.registry import trainer

    trial = Trial.from_dict(json.loads(config["trial"]))
    ledger = Ledger(Path(config["project"]))
    row = ledger.find((trial.key, trial.tokens))
    if row is None and ledger.raised(trial.key, since=config["since"]) > RETRIES:
        tune.report({"status": "failed", "loss": None, "seconds": None})
        return
    if row is None:
        workspace = Path(config["workspace"])
        workspace.mkdir(parents=True, exist_ok=True)
        last = time.monotonic()
        try:
            for event in trainer(trial.trainer).train(trial, workspace):
                if isinstance(event, Measurement):
                    ledger.write(trial, event)
                elif time.monotonic() - last > REPORT_EVERY_SECONDS:
                    last = time.monotonic()
                    fraction = event.tokens / trial.tokens
                    tune.report({"fraction": fraction, "train_loss": event.train_loss})
        except Exception as error:
            ledger.record_failure(trial, f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        row = ledger.find((trial.key, trial.tokens))
        assert row is not None, f"{trial.trainer} ended without a measurement of {trial.key}"
    tune.report({name: row[name] for name in ("status", "loss", "seconds")})


class _Watch(Callback):
    """Passes Tune's events on to the progress view and the tracker, in the driver."""

    def __init__(
        self,
        ledger: Ledger,
        since: str,
        progress: Progress,
        finished: Finished,
        lost: set[str],
    ) -> None:
        self._ledger = ledger
        self._since = since
        self._lost = lost
        self._progress = progress
        self._finished = finished

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; consoles and threads cannot be

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its actor."""
        self._progress.running(trial.config["key"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported progress or its measurement."""
        key = trial.config["key"]
        if "fraction" in result:
            self._progress.running(key, result["fraction"], result["train_loss"])
        elif "status" in result:
            self._progress.ended(key, result["status"], result["loss"], result["seconds"])
            if result["status"] != "failed":
                self._finished(key)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed and will be tried again."""
        self._record(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune gives a trial up."""
        self._record(trial)
        self._progress.waiting(trial.config["key"])
        self._lost.add(trial.config["key"])

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """The run is over: by an interrupt, if it left trials unfinished."""
        if not all(trial.is_finished() for trial in trials):
            self._lost.clear()

    def _record(self, trial: Any) -> None:
        """Keep the failure of a worker that died: one that raised has left its own record."""
        # Ray's account of this failure, after those of earlier ones.
        account = Path(trial.error_file).read_text().rsplit("Failure # ", 1)[-1]
        known = any(record["traceback"] == account for record in self._ledger.failures())
        if "The actor died" in account and not known:
            lost = Trial.from_dict(json.loads(trial.config["trial"]))
            self._ledger.record_failure(lost, WORKER_DIED, account)
