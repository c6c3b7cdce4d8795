"""An MLflow experiment, ours or not, as a source of observations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis.arrow_types import plain_types
from analysis.errors import InputError, first_line
from analysis.observations import SCHEMA
from orchestrator.masking import masked
from orchestrator.runs import METRICS, PARAMS, TOKENS_TAG, TRIAL_TAG
from orchestrator.tracking import quieten


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
        `role`. All other runs have a column a parameter and a metric, the last value of each, and
        `status`, such as FINISHED or RUNNING. Where a parameter and a metric share a name they are
        called params.NAME and metrics.NAME.

    Raises
    ------
    InputError
        If there is no such store, experiment or run.
    """
    quieten()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(f"where is the experiment {name!r}? say so with --tracking-uri")
    store = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not store.exists():  # MLflow would make an empty one
        raise InputError(f"--tracking-uri {masked(uri)}: there is no file {masked(str(store))}")
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
            raise InputError(f"{masked(uri)} has no experiment {name!r}; it has {known}")
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
        raise InputError(masked(f"--tracking-uri {uri}: {first_line(error)}")) from error
    if not runs:
        raise InputError(f"the experiment {name!r} in {masked(uri)} has no runs")
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
    """Somebody's runs: parameters, metrics, and how each run ended."""
    params = sorted({name for run in runs for name in run.data.params})
    metrics = sorted({name for run in runs for name in run.data.metrics})
    columns = {}
    for name in params:
        label = f"params.{name}" if name in metrics else name
        columns[label] = pa.array([run.data.params.get(name) for run in runs], pa.string())
    for name in metrics:
        label = f"metrics.{name}" if name in params else name
        columns[label] = pa.array([run.data.metrics.get(name) for run in runs], pa.float64())
    own = "status" if "status" not in columns else "run_status"
    columns[own] = pa.array([run.info.status for run in runs], pa.string())
    return plain_types(pa.table(columns))
