"""Runs that somebody trained elsewhere, put into a project's ledger and marked as such."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.errors import InputError
from analysis.losses import LOSSES
from analysis.observations import SCHEMA_VERSION, Observations, observation_ids
from orchestrator.lease import hold
from orchestrator.planner import Plan
from orchestrator.project import create_project
from trainers.trial import KEY_LENGTH

TRAINER = "external"
"""The trainer of runs that isoflop did not train."""
MOST = 100_000
"""Runs added at once: a ledger is a file an observation."""
IN_KEY = ("tokens", "params_given", "flops_given", "loss", "loss_stderr", "weight", "corpus_hash")
"""Columns that make a run the one that it is."""
LEAST_TOKENS = 1000
"""Below it D is in another unit; whole tokens name an observation."""


@dataclass(frozen=True, kw_only=True)
class Added:
    """What `add` did."""

    written: int
    known: int
    """Runs that were in the ledger already."""


def add(location: str | Path, obs: Observations, name: str) -> Added:
    """Write observations of others into a ledger, as a kind of their own.

    Parameters
    ----------
    location
        Path or URI of the project, which is made if there is none.
    obs
        N, D, C and L as their source counts them. C by 6ND is not kept, but made again when read.
    name
        What they are called: the corpus of their kind, since losses of different sources do not
        compare.

    Raises
    ------
    InputError
        If there are more than 100 000, or D is not in tokens, or the project cannot be written or
        a driver is at work in it.

    Notes
    -----
    Keys are hashes of the content and of `name`, so that adding again adds nothing.
    """
    if len(obs) > MOST:
        raise InputError(
            f"{len(obs)} runs are too many for a ledger, which takes {MOST} at once: "
            "fit their file itself"
        )
    if obs.tokens.min() < LEAST_TOKENS:
        raise InputError(
            f"D is {obs.tokens.min():.4g} tokens in a run to be added, and it must be at least "
            f"{LEAST_TOKENS}: is it in millions or billions?"
        )
    project = create_project(location)
    with hold(project.storage, "adding runs"):
        written = sum(project.ledger.write_row(row) for row in _rows(obs, name))
    return Added(written=written, known=len(obs) - written)


def _rows(obs: Observations, name: str) -> list[dict[str, Any]]:
    corpus = hashlib.sha256(name.encode()).hexdigest()[:KEY_LENGTH]
    contents = [_content(obs, i, corpus) for i in range(len(obs))]
    keys = [_key(content) for content in contents]
    _, first, label, count = np.unique(
        obs.trunk, return_index=True, return_inverse=True, return_counts=True
    )
    return [
        {
            **content,
            "trial": keys[i],
            # Not part of the key: what is in a file beside a run does not make it another run.
            "trunk": keys[first[label[i]]] if count[label[i]] > 1 else None,
            "budget": _known(obs.budget[i]),
            "loss_unit": None if obs.loss_unit == LOSSES["loss"] else obs.loss_unit,
            "status": "complete",
            "trainer": TRAINER,
            "corpus": name,
            "finished_at": datetime.now(UTC),
            "schema_version": SCHEMA_VERSION,
        }
        for i, content in enumerate(contents)
    ]


def _content(obs: Observations, i: int, corpus: str) -> dict[str, Any]:
    """What makes a run the one that it is."""
    return {
        "tokens": round(float(obs.tokens[i])),
        "params_given": float(obs.params[i]),
        "flops_given": None if obs.flops_convention == "6nd" else float(obs.flops[i]),
        "loss": float(obs.loss[i]),
        "loss_stderr": _known(obs.loss_stderr[i]),
        "weight": float(obs.weight[i]),
        "corpus_hash": corpus,
    }


def _key(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def external_counts(rows: pa.Table, plans: Iterable[Plan]) -> dict[str, int]:
    """How many external observations are among a ledger's rows, by name, that no plan asks for."""
    planned = {p.id for plan in plans for p in plan.planned}
    marks = zip(rows["trainer"].to_pylist(), rows["corpus"].to_pylist(), strict=True)
    counted = Counter(
        corpus
        for name, (trainer, corpus) in zip(observation_ids(rows), marks, strict=True)
        if trainer == TRAINER and name not in planned
    )
    return dict(counted)


def key_of(row: Mapping[str, Any]) -> str:
    """Return the key of an external row, made anew from what the row says."""
    return _key({name: row[name] for name in IN_KEY})
