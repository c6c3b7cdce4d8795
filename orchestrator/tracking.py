"""MLflow as a view of the ledger: a parent run a sweep, a child run an observation.

Written by one process at a time, from the ledger alone, so that it can be rebuilt from nothing.
Uses the client directly: no global state, no active runs. When it is written, and what happens
while MLflow is away, is in `mirror.py`; comparing it with the ledger in `sync.py`; reading an
experiment in `experiment.py`.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import InputError, first_line
from analysis.observations import ObservationId
from orchestrator import evaluations
from orchestrator.artifacts import DATABASE, artifact_name, artifacts_uri, keep_inside
from orchestrator.ledger import row_of
from orchestrator.masking import masked
from orchestrator.planner import Plan, Planned
from orchestrator.project import Project
from orchestrator.runs import (
    PARENT_TAG,
    PLAN_TAG,
    PROJECT_TAG,
    SWEEP_TAG,
    TOKENS_TAG,
    TRIAL_TAG,
    name_of,
    params_of,
    points_of,
    span_of,
    status_of,
)

ROWS_AT_ONCE = 100
"""Rows of the ledger in memory at once."""
WRITERS = 4
"""Runs written at once where MLflow is a server, most of whose time is waiting."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""A server that is away is told of in seconds, not minutes, unless the environment says more."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where a project's runs are."""

    uri: str
    """MLflow's tracking URI."""
    artifacts: str | None
    """Where artifacts go; None where the server says so."""
    own: bool
    """Whether it is in the project's directory, so that no other project's runs are in it."""

    @property
    def shown(self) -> str:
        """Its URI without a password."""
        return masked(self.uri)


def store_uri(project: Project) -> str:
    """The MLflow store in a local project."""
    return f"sqlite:///{_directory(project) / DATABASE}"


def store_of(project: Project, given: str | None = None) -> Store | None:
    """What was `given`, else what MLFLOW_TRACKING_URI says, else a local project's own, else none.

    Raises
    ------
    InputError
        If it is a plain directory, in which MLflow keeps no runs any more.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if project.local is not None and uri in (None, "", store_uri(project)):
        return Store(uri=store_uri(project), artifacts=artifacts_uri(project.local), own=True)
    if not uri:
        return None
    if uri.startswith("file:") or not re.match(r"databricks|uc:|[a-z0-9+]+://", uri):
        raise InputError(
            f"--tracking-uri {masked(uri)} is neither an MLflow server nor a database: "
            "give http://HOST:PORT or sqlite:///FILE"
        )
    if not uri.startswith("sqlite:///"):
        return Store(uri=uri, artifacts=None, own=False)
    database = Path(uri.removeprefix("sqlite:///")).resolve()
    return Store(uri=f"sqlite:///{database}", artifacts=artifacts_uri(database.parent), own=False)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a sweep came to, for its parent run."""

    plan: str
    metrics: dict[str, float]
    artifacts: tuple[str, ...]
    """Paths of files."""
    ended: bool
    """Whether nothing of the plan is missing."""


class Tracker:
    """A project's runs in an MLflow store.

    Contract: one tracker at a time writes a project's runs, which is for its user to see to. A run
    is closed after everything else in it is written: an open one is half of one, and is removed
    and written anew. Every method may be repeated: nothing doubles. What MLflow raises goes
    through, and after it a new tracker must be made, which finds out what is there.
    """

    def __init__(self, project: Project, store: Store) -> None:
        quieten()
        _check_database(store)
        if store.own:
            keep_inside(project)
        from mlflow import MlflowClient

        self._project, self._store = project, store
        self.client = MlflowClient(tracking_uri=store.uri)
        self.experiment, self._experiment = self._find_or_create_experiment()
        self.half_written = self.duplicates = 0  # runs that were removed
        self.refused: dict[ObservationId, str] = {}
        """Observations that MLflow does not take, and why."""
        self.unattached: dict[str, str] = {}
        """Files that it does not take, and why."""
        self._runs: dict[ObservationId, str] = {}
        self._latest = 0
        self._tidy()
        self.planned: dict[ObservationId, Planned] = {}
        """What plans ask for."""
        self._parents: dict[ObservationId, tuple[str, str]] = {}
        self._sweeps: dict[str, str] = {}
        self.read_plans()

    def read_plans(self) -> None:
        """Take up the project's plans; an observation belongs to the first that asks for it."""
        runs = {run.data.tags[SWEEP_TAG]: run for run in self.search(SWEEP_TAG)}
        for plan in self._project.plans():
            run = runs.get(plan.name) or self.client.create_run(
                self._experiment, tags={SWEEP_TAG: plan.name}, run_name=plan.name
            )
            self._sweeps[plan.name] = str(run.info.run_id)
            self._describe(plan, run)
            for planned in plan.planned:
                self.planned.setdefault(planned.id, planned)
                self._parents.setdefault(planned.id, (plan.name, run.info.run_id))

    def missing(self) -> list[ObservationId]:
        """What the ledger has and MLflow lacks, of what plans ask for."""
        measured = self._project.ledger.ids()
        there = self._runs.keys() | self.refused.keys()
        return [name for name in self.planned if name in measured and name not in there]

    def unknown(self) -> list[ObservationId]:
        """What MLflow has and the ledger lacks; it is left."""
        return sorted(self._runs.keys() - self._project.ledger.ids())

    def write(self, names: Sequence[ObservationId]) -> Iterator[ObservationId]:
        """Write the runs of observations that are in the ledger, and tell of each.

        Those that are there already, or that no plan asks for, are passed over.
        """
        wanted = [n for n in dict.fromkeys(names) if n in self.planned and n not in self._runs]
        with ThreadPoolExecutor(1 if self._store.uri.startswith("sqlite") else WRITERS) as pool:
            for i in range(0, len(wanted), ROWS_AT_ONCE):
                read = self._project.ledger.survey(set(wanted[i : i + ROWS_AT_ONCE]))
                for odd in read.left_out:
                    if (name := row_of(odd.file)) is not None:
                        self.refused[name] = odd.reason
                for name, run in pool.map(self._write, read.table.to_pylist()):
                    if run is not None:
                        self._runs[name] = run
                        yield name

    def add_evaluations(self) -> int:
        """Give runs the scores of their models that they lack; of how many runs."""
        from mlflow.entities import Metric

        scores, n = evaluations.points(self._project.storage), 0
        for run in self.search(TRIAL_TAG) if scores else []:
            own, there = scores.get(name_of(run), []), run.data.metrics
            lacking = [Metric(*point, 0) for point in own if there.get(point[0]) != point[1]]
            if lacking:
                self.client.log_batch(run.info.run_id, lacking)
                n += 1
        return n

    def conclude(self, results: Results) -> None:
        """Attach a sweep's results to its run, and close it if the sweep has ended.

        Their time is when the last observation was measured: the same results again are no further
        point of a metric.
        """
        from mlflow.entities import Metric

        run, step = self._sweeps[results.plan], int(results.metrics.get("observations", 0))
        points = [Metric(k, v, self._latest, step) for k, v in results.metrics.items()]
        self.client.log_batch(run, metrics=points)
        if results.ended:
            self.client.set_terminated(run, "FINISHED")
        self.unattached = {}
        for path in results.artifacts:
            try:
                self._attach(run, path)
            except Exception as error:  # whatever their store raises: it is not MLflow's own
                self.unattached[path] = masked(first_line(error, named=True))

    def _attach(self, run: str, path: str) -> None:
        """Copy a file to a run's artifacts; in an own store links are not followed."""
        if self._store.own:
            self._project.storage.upload(Path(path), artifact_name(run, Path(path)))
        else:
            self.client.log_artifact(run, path, "figures" if path.endswith(".png") else None)

    def search(self, tag: str) -> list[Any]:
        """All runs that have a tag: at once, since removing some of them moves MLflow's pages."""
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self._experiment], f"tags.`{tag}` != ''", max_results=1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _find_or_create_experiment(self) -> tuple[str, str]:
        """Name and id. Called as the project, unless another project of its name was first."""
        uri = self._project.uri
        for name in (self._project.name, f"{self._project.name} ({uri})"):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                break
            if self._store.own or found.tags.get(PROJECT_TAG, uri) == uri:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                return name, str(found.experiment_id)
        tags = {
            PROJECT_TAG: uri,
            "mlflow.experimentKind": "custom_model_development",  # how its UI opens
        }
        return name, str(self.client.create_experiment(name, self._store.artifacts, tags))

    def _tidy(self) -> None:
        """Find out which runs there are; remove halves and doubles."""
        for run in sorted(self.search(TRIAL_TAG), key=lambda run: str(run.info.run_id)):
            name, half = name_of(run), run.info.end_time is None
            if half or name in self._runs:
                self.client.delete_run(run.info.run_id)
                self.half_written += half
                self.duplicates += not half
            else:
                self._runs[name] = run.info.run_id
                self._latest = max(self._latest, run.info.end_time)

    def _describe(self, plan: Plan, run: Any) -> None:
        """Tags, not params: a plan may grow."""
        from mlflow.entities import RunTag

        tags = {
            "trials": str(len(plan.planned)),
            "flops": f"{plan.flops:.4g}",
            "budgets": " ".join(f"{b.flops:g}" for b in plan.spec.budgets),
            "trainer": plan.spec.trainer,
            "recipe": plan.spec.recipe.name,
        }
        if not tags.items() <= run.data.tags.items():
            self.client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def _write(self, row: dict[str, Any]) -> tuple[ObservationId, str | None]:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        name = row["trial"], row["tokens"]
        points = [Metric(*point) for point in points_of(row)]
        params = [Param(k, v) for k, v in params_of(row, self.planned[name]).items()]
        try:
            run = self._create_run(row, name)
            self.client.log_batch(run, points, params)  # in calls of a thousand
            end = span_of(row)[1]
            self.client.set_terminated(run, status_of(row), end_time=end)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # And that must not hold up the others.
            self.refused[name] = masked(first_line(error, named=True))
            return name, None
        self._latest = max(self._latest, end)
        return name, run

    def _create_run(self, row: dict[str, Any], name: ObservationId) -> str:
        plan, parent = self._parents[name]
        budget = self.planned[name].budget
        run = self.client.create_run(
            self._experiment,
            start_time=span_of(row)[0],
            run_name=f"{budget:.3g} FLOPs, width {row['width']}, seed {row['seed']}",
            tags={
                PARENT_TAG: parent,
                PLAN_TAG: plan,
                TRIAL_TAG: row["trial"],
                TOKENS_TAG: str(row["tokens"]),
                "isoflop.status": row["status"],
                **({"isoflop.reason": row["reason"]} if row["reason"] else {}),
            },
        )
        return str(run.info.run_id)


def quieten() -> None:
    """No telemetry, no notices on the console, no long waits."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trust_the_disk() -> None:
    """Let SQLite not wait for the disk, in this process: it is a quarter of the time of a run.

    A killed process loses nothing by it. A power cut may damage the database, which is a view that
    `isoflop sync` rebuilds. The journal stays as it is: a write-ahead log would be faster still,
    but does not work on a shared file system.
    """
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")


def _check_database(store: Store) -> None:
    """MLflow would try a file that is no database for two minutes."""
    path = Path(store.uri.removeprefix("sqlite:///"))
    if store.uri.startswith("sqlite:///") and path.is_file():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise InputError(f"{path} is no SQLite database: move it away")


def _directory(project: Project) -> Path:
    if project.local is None:
        raise InputError(f"{project.uri} is no directory: say with --tracking-uri where MLflow is")
    return project.local
