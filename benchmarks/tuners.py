"""Ray Tune as it comes, beside our sweeps in `benchmarks.orchestration`: each function is one part.

Ray's defaults, save what is named here: two cores, no dashboard, loopback and a token.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner

from orchestrator.project import open_project
from orchestrator.runs import Point, params_of, points_of

SLOTS = 2
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80_000_000
"""As our own sweeps have it."""
EXPERIMENT = "benchmark"


class Times(Callback):
    """When the first trial started, and when each ended."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.ends: list[float] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its actor."""
        self.first = self.first or time.time()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended."""
        self.ends.append(time.time())


def bare(trials: int, directory: str, loggers: bool) -> dict[str, Any]:
    """A function that reports once, with `reuse_actors=True`.

    `loggers` is whether Tune writes its CSV and JSON files, as it does by default.
    """
    if not loggers:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"

    def function(config: dict[str, Any]) -> None:
        tune.report({"loss": 1.0})

    times = _tune(function, trials, directory, TuneConfig(reuse_actors=True))
    assert times.first is not None
    return {"trials": trials, "seconds": times.ends[-1] - times.first}


def with_mlflow(trials: int, directory: str, model: str) -> dict[str, Any]:
    """A function that writes a run into MLflow and reports once, with no option of Tune's at all.

    The run is what one of ours has, from the project `model`, written in one call: the quickest
    way, where most programs call once a point. MLflow's database is made before.

    Returns
    -------
    Seconds a trial once every slot has had its first.
    """
    uri = f"sqlite:///{directory}/mlflow.db"
    experiment = _experiment(uri)
    points, told = _run_of(model)

    def function(config: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=uri)
        run = client.create_run(experiment).info.run_id
        metrics = [Metric(*point) for point in points]
        params = [Param(name, value) for name, value in told.items()]
        client.log_batch(run, metrics=metrics, params=params)
        client.set_terminated(run)
        tune.report({"loss": 1.0})

    times = _tune(function, trials, directory, TuneConfig())
    steady = times.ends[SLOTS:]  # the first of each slot also warms the disk's cache
    seconds = (steady[-1] - times.ends[SLOTS - 1]) / len(steady)
    return {"trials": trials, "seconds_per_trial": seconds, "runs": _runs(uri, experiment)}


def _tune(
    function: Callable[[dict[str, Any]], None], trials: int, directory: str, config: TuneConfig
) -> Times:
    times = Times()
    with _ray(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        tuner = Tuner(
            function,
            param_space={"index": tune.grid_search(list(range(trials)))},
            tune_config=config,
            run_config=RunConfig(storage_path=directory, callbacks=[times]),
        )
        tuner.fit()
    assert len(times.ends) == trials
    return times


@contextmanager
def _ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=SLOTS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _run_of(project: str) -> tuple[list[Point], dict[str, str]]:
    """Metrics and parameters of the first run of a project's first plan."""
    opened = open_project(project)
    planned = opened.plans()[0].planned[0]
    row = opened.ledger.find(planned.id)
    assert row is not None
    return points_of(row), params_of(row, planned)


def _experiment(uri: str) -> str:
    """Make the database, once: several processes that make it together break it."""
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri=uri).create_experiment(EXPERIMENT))


def _runs(uri: str, experiment: str) -> int:
    from mlflow import MlflowClient

    return len(MlflowClient(tracking_uri=uri).search_runs([experiment]))
