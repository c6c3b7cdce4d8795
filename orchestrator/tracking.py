"""MLflow as a view of the ledger: a parent run a sweep, a child run an observation.

Written by the driver alone and reconciled from the ledger, so that it can be rebuilt from nothing.
Uses the client directly: no global state, no active runs. An experiment, ours or not, is a source
of observations too.
"""

from __future__ import annotations

import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from analysis.errors import InputError
from analysis.observations import SCHEMA, ObservationId
from orchestrator.planner import Plan, Planned
from orchestrator.project import Project

PARAMS = (
    "width",
    "depth",
    "heads",
    "vocabulary",
    "context",
    "batch_tokens",
    "learning_rate",
    "schedule",
    "recipe",
    "trainer",
    "corpus",
    "corpus_hash",
    "seed",
    "device",
)
METRICS = (
    "loss",
    "loss_stderr",
    "bits_per_byte",
    "params_non_embedding",
    "params_matmul",
    "params_total",
    "tokens",
    "flops_exact",
    "flops_6nd",
    "seconds",
    "mfu",
)
SWEEP_TAG = "isoflop.sweep"  # on parents only
PLAN_TAG, TRIAL_TAG, TOKENS_TAG = "isoflop.plan", "isoflop.trial", "isoflop.tokens"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own


def store_uri(project: Project) -> str:
    """The MLflow store of a local project."""
    return f"sqlite:///{project.path / 'mlflow.db'}"


def artifacts_uri(project: Project) -> str:
    """Where a local project's artifacts are."""
    return (project.path / "mlartifacts").as_uri()


class Tracker:
    """One plan's runs in its project's store. Every method may be repeated: nothing doubles."""

    def __init__(self, project: Project, plan: Plan) -> None:
        _quieten()
        from mlflow import MlflowClient

        self._project, self._plan = project, plan
        self._client = MlflowClient(tracking_uri=store_uri(project))
        self._experiment = self._find_or_create_experiment()
        self._runs = self._existing()
        self._parent = self._find_or_create_parent()
        self._describe_parent()

    def record(self, table: pa.Table) -> None:
        """Write those rows of the ledger that this plan asks for and MLflow lacks."""
        planned = {p.id: p for p in self._plan.planned}
        for row in table.to_pylist():
            name = (row["trial"], row["tokens"])
            if name in planned and name not in self._runs:
                self._runs[name] = self._write(row, planned[name])

    def conclude(
        self, metrics: dict[str, float], artifacts: list[Path], *, at: datetime, ended: bool
    ) -> None:
        """Attach the sweep's results to its run, and close it if the sweep has `ended`.

        `at` is when the last observation behind them was measured: the same results again are no
        further point of a metric.
        """
        from mlflow.entities import Metric

        when, step = _milliseconds(at), int(metrics.get("observations", 0))
        self._client.log_batch(
            self._parent, metrics=[Metric(k, v, when, step) for k, v in metrics.items()]
        )
        for path in artifacts:
            self._client.log_artifact(
                self._parent, str(path), "figures" if path.suffix == ".png" else None
            )
        if ended:
            self._client.set_terminated(self._parent, "FINISHED")

    def _find_or_create_experiment(self) -> str:
        name = self._project.path.name
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        return str(
            self._client.create_experiment(
                name,
                artifact_location=artifacts_uri(self._project),
                tags={"mlflow.experimentKind": "custom_model_development"},  # how its UI opens
            )
        )

    def _existing(self) -> dict[ObservationId, str]:
        runs: dict[ObservationId, str] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                filter_string=f"tags.`{TRIAL_TAG}` != ''",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                name = run.data.tags[TRIAL_TAG], int(run.data.tags[TOKENS_TAG])
                if run.info.end_time is None:  # the driver died while it was writing this one
                    self._client.delete_run(run.info.run_id)
                else:
                    runs[name] = run.info.run_id
            token = page.token
            if not token:
                return runs

    def _find_or_create_parent(self) -> str:
        mine = f"tags.`{SWEEP_TAG}` = '{self._plan.name}'"
        for run in self._client.search_runs([self._experiment], filter_string=mine, max_results=1):
            return str(run.info.run_id)
        run = self._client.create_run(
            self._experiment, tags={SWEEP_TAG: self._plan.name}, run_name=self._plan.name
        )
        return str(run.info.run_id)

    def _describe_parent(self) -> None:
        """Tags, not params: a plan may grow."""
        spec = self._plan.spec
        for name, value in (
            ("trials", str(len(self._plan.planned))),
            ("flops", f"{self._plan.flops:.4g}"),
            ("budgets", " ".join(f"{b.flops:g}" for b in spec.budgets)),
            ("trainer", spec.trainer),
            ("recipe", spec.recipe),
        ):
            self._client.set_tag(self._parent, name, value)

    def _write(self, row: dict[str, Any], planned: Planned) -> str:
        from mlflow.entities import Metric, Param

        end = _milliseconds(row["finished_at"])
        start = end - int(1000 * row["seconds"])
        run = self._client.create_run(
            self._experiment,
            start_time=start,
            run_name=f"{planned.budget:.3g} FLOPs, width {row['width']}, seed {row['seed']}",
            tags={
                PARENT_TAG: self._parent,
                PLAN_TAG: self._plan.name,
                TRIAL_TAG: row["trial"],
                TOKENS_TAG: str(row["tokens"]),
                "isoflop.status": row["status"],
                **({"isoflop.reason": row["reason"]} if row["reason"] else {}),
            },
        )
        run_id = str(run.info.run_id)
        last = row["curve"][-1]["step"] if row["curve"] else 0
        points = [(k, row[k], last, end) for k in METRICS]
        for point in row["curve"]:
            # Deterministic times, so that writing the same point again changes nothing.
            at = start + int((end - start) * point["step"] / max(last, 1))
            points += [(k, point[k], point["step"], at) for k in ("train_loss", "heldout_loss")]
        params = {"budget": f"{planned.budget:g}", "role": planned.role} | {
            name: row[name] for name in PARAMS
        }
        self._client.log_batch(
            run_id,
            metrics=[Metric(k, v, at, step) for k, v, step, at in points if v is not None],
            params=[Param(name, str(value)) for name, value in params.items()],
        )
        status = "FINISHED" if row["status"] == "complete" else "FAILED"
        self._client.set_terminated(run_id, status, end_time=end)
        return run_id


class BackgroundTracker:
    """Writes MLflow beside the training, off its path. Use as a context manager.

    A failure is kept in `error`, not raised: the ledger is complete without MLflow, and the next
    run of any sweep of the project writes what is missing.
    """

    def __init__(self, project: Project, plan: Plan) -> None:
        self._project, self._plan = project, plan
        self._keys: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._tracker: Tracker | None = None
        self.error: Exception | None = None

    def __enter__(self) -> BackgroundTracker:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._keys.put(None)
        self._thread.join()

    def finished(self, key: str) -> None:
        """A trial's row is in the ledger."""
        self._keys.put(key)

    def conclude(self, metrics: dict[str, float], artifacts: list[Path], *, ended: bool) -> None:
        """After the block: attach results, and write whatever other plans' runs are missing."""
        if self._tracker is None or self.error is not None:
            return
        try:
            table = self._project.ledger.read()
            last = max(table["finished_at"].to_pylist(), default=datetime.now(UTC))
            for plan in self._project.plans():
                if plan.name != self._plan.name:
                    Tracker(self._project, plan).record(table)
            self._tracker.record(table)
            self._tracker.conclude(metrics, artifacts, at=last, ended=ended)
        except Exception as error:
            self.error = error

    def _work(self) -> None:
        ledger = self._project.ledger
        horizons = {p.trial.key: p.id for p in self._plan.planned}
        try:
            self._tracker = Tracker(self._project, self._plan)
            self._tracker.record(ledger.read(set(horizons.values())))
            while (key := self._keys.get()) is not None:
                self._tracker.record(ledger.read({horizons[key]}))
        except Exception as error:
            self.error = error


def read_experiment(name: str, uri: str | None, *, own: bool = True) -> pa.Table:
    """The runs of an experiment as a table, a row a run.

    Parameters
    ----------
    name
        The experiment's name.
    uri
        MLflow's store; by default what MLFLOW_TRACKING_URI says.
    own
        Whether runs that isoflop wrote are to be read as observations, with `SCHEMA`'s columns and
        `role`. All other runs have a column a parameter and a metric, the last value of each. Where
        the two share a name they are called params.NAME and metrics.NAME.

    Raises
    ------
    InputError
        If there is no such store, experiment or run.
    """
    _quieten()
    # A server that is away is told of in seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(f"where is the experiment {name!r}? say so with --tracking-uri")
    store = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not store.exists():  # MLflow would make an empty one
        raise InputError(f"--tracking-uri {uri}: there is no file {store}")
    runs = _runs_of(name, uri)
    ours = [run for run in runs if TRIAL_TAG in run.data.tags]
    if own and ours:
        return _observed(ours)
    return _tabulated(runs)


def _runs_of(name: str, uri: str) -> list[Any]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            known = ", ".join(repr(e.name) for e in client.search_experiments())
            raise InputError(f"{uri} has no experiment {name!r}; it has {known}")
        runs, token = [], None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], max_results=1000, page_token=token
            )
            runs += list(page)
            token = page.token
            if not token:
                break
    except (MlflowException, OSError) as error:
        raise InputError(f"--tracking-uri {uri}: {str(error).splitlines()[0]}") from error
    if not runs:
        raise InputError(f"the experiment {name!r} in {uri} has no runs")
    return runs


def _observed(runs: list[Any]) -> pa.Table:
    """Our own runs, as rows of `SCHEMA` with `role`; what MLflow was not told is null."""
    rows = []
    for run in runs:
        tags, params = run.data.tags, run.data.params
        rows.append(
            {
                **{name: params.get(name) for name in PARAMS},
                **{name: run.data.metrics.get(name) for name in METRICS},
                "trial": tags[TRIAL_TAG],
                "tokens": tags[TOKENS_TAG],
                "status": tags["isoflop.status"],
                "reason": tags.get("isoflop.reason"),
                "recipe_hash": params.get("recipe"),
                "budget": params.get("budget"),
                "role": params.get("role", "grid"),
            }
        )
    kinds = {field.name: field.type for field in SCHEMA} | {"role": pa.string()}

    def value(raw: Any, kind: pa.DataType) -> Any:
        if raw in (None, "None"):
            return None
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        return float(raw) if number else raw

    names = [name for name in kinds if name in rows[0]]
    columns = {
        name: pa.array([value(row[name], kinds[name]) for row in rows]).cast(kinds[name])
        for name in names
    }
    nulls = {n: pa.nulls(len(rows), kind) for n, kind in kinds.items() if n not in columns}
    return pa.table(columns | nulls)


def _tabulated(runs: list[Any]) -> pa.Table:
    """Somebody's runs: parameters as text, metrics as numbers."""
    params = sorted({name for run in runs for name in run.data.params})
    metrics = sorted({name for run in runs for name in run.data.metrics})
    columns = {}
    for name in params:
        label = f"params.{name}" if name in metrics else name
        columns[label] = pa.array([run.data.params.get(name) for run in runs], pa.string())
    for name in metrics:
        label = f"metrics.{name}" if name in params else name
        columns[label] = pa.array([run.data.metrics.get(name) for run in runs], pa.float64())
    return pa.table(columns)


def _milliseconds(time: datetime) -> int:
    return int(time.timestamp() * 1000)


def _quieten() -> None:
    """No telemetry, no notices of migrations on the console."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
