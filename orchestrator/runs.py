"""What a run in MLflow says: a row of the ledger as tags, parameters and metrics."""

from __future__ import annotations

import hashlib
import math
import re
from datetime import datetime
from typing import Any

from analysis.observations import ObservationId
from orchestrator.planner import Planned

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
CURVES = ("train_loss", "heldout_loss")
PROJECT_TAG = "isoflop.project"  # on experiments
SWEEP_TAG = "isoflop.sweep"  # on parents only
PLAN_TAG, TRIAL_TAG, TOKENS_TAG = "isoflop.plan", "isoflop.trial", "isoflop.tokens"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own

Point = tuple[str, float, int, int]
"""Of a curve: name, value, time in milliseconds, step."""


def name_of(run: Any) -> ObservationId:
    """Which observation a run is of."""
    return run.data.tags[TRIAL_TAG], int(run.data.tags[TOKENS_TAG])


def status_of(row: dict[str, Any]) -> str:
    """MLflow's word for a row's status."""
    return "FINISHED" if row["status"] == "complete" else "FAILED"


def params_of(row: dict[str, Any], planned: Planned) -> dict[str, str]:
    """A row as MLflow's parameters."""
    values = {name: str(row[name]) for name in PARAMS}
    return {"budget": f"{planned.budget:g}", "role": planned.role, **values}


def points_of(row: dict[str, Any]) -> list[Point]:
    """A row as MLflow's metrics: only finite ones, since it makes 1.8e308 of infinity.

    Times are made from the row's own, so that writing a point again changes nothing.
    """
    start, end = span_of(row)
    curve = row["curve"] or []
    last = curve[-1]["step"] if curve else 0
    points = [(k, row[k], end, last) for k in METRICS]
    domains = row["domains"] or []
    names = _of_domains([domain["name"] for domain in domains])
    points += [(name, d["loss"], end, last) for name, d in zip(names, domains, strict=True)]
    for point in curve:
        at = start + int((end - start) * point["step"] / max(last, 1))
        points += [(k, point[k], at, point["step"]) for k in CURVES]
    return [point for point in points if point[1] is not None and math.isfinite(point[1])]


def _of_domains(names: list[str]) -> list[str]:
    """The metrics of domains' losses; those that MLflow would take for one are told by hash."""
    short = [plain(f"loss {name}") for name in names]
    hashes = [hashlib.sha256(name.encode()).hexdigest()[:6] for name in names]
    return [
        metric if short.count(metric) == 1 else f"{metric} {digest}"
        for metric, digest in zip(short, hashes, strict=True)
    ]


def plain(name: str) -> str:
    """A name as MLflow takes it: few signs."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def span_of(row: dict[str, Any]) -> tuple[int, int]:
    """A trial's start and end in milliseconds."""
    finished: datetime = row["finished_at"]
    end = int(finished.timestamp() * 1000)
    return end - int(1000 * (row["seconds"] or 0.0)), end
