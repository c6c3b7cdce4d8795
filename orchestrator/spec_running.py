"""The tables of sweep.toml that say how a sweep runs. None changes a trial or enters its key."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from analysis.numerals import read_number
from cluster.budget import Caps
from cluster.machines import Cluster, uniform
from trainers.gpus import KNOWN, known_type
from trainers.trial import Trial

GIGABYTE = 1e9
NEVER = "never"
"""What a person writes for None, which TOML does not have."""


class Strict(BaseModel):
    """A table: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as_printed(value: Any) -> Any:
    return read_number(value) if isinstance(value, str) else value


def whole_number(value: Any) -> Any:
    """A count that was written as 1e9 or "10B"; what is none is left to others.

    Raises
    ------
    ValueError
        If text is no number, or none without decimals.
    """
    number = _as_printed(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if isinstance(value, str):
        raise ValueError(f"{value!r} is not a whole number")
    return value


AsPrinted = BeforeValidator(_as_printed)
"""Validates a number that may be written as text, such as "100k" or "2 PF-days"."""


def _or_never(value: Any) -> Any:
    if value == NEVER:
        return None
    if isinstance(value, str):
        raise ValueError(f'is {value!r}, but it should be a number without quotes or "{NEVER}"')
    return value


def _deadline(value: Any) -> Any:
    """Hours as they are; a time must say its zone."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 < value < math.inf:
            raise ValueError(f"is {value}, but it should be hours, more than 0")
        return float(value)
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"is {value!r}: write hours, such as 36, or a time such as 2026-12-01T08:00:00Z"
        ) from error
    if found.tzinfo is None:
        raise ValueError(f"is {value!r}, of no time zone: write it as {found.isoformat()}Z, in UTC")
    return found


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_OrNever = BeforeValidator(_or_never)


class Limits(Strict):
    """What a sweep may spend, and how patient it is with its trials."""

    flops: Annotated[_Positive | None, AsPrinted] = None
    """Exact training FLOPs in all; the cheapest trials are started, the others held back."""
    gpu_hours: _Positive | None = None
    """GPU-hours in all, by expectation and then as taken."""
    money: _Positive | None = None
    """In the currency of `cluster.price_per_gpu_hour`, without which it bounds nothing."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Trials at once."""
    deadline: Annotated[float | datetime | None, BeforeValidator(_deadline)] = None
    """Hours from the start, or a time with its zone. What should end later is not started."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further attempts of a trial that raised, fell silent or was too slow."""
    restarts: Annotated[int, Field(ge=0)] = 4
    """Further attempts of a trial that lost its worker or node, which is not its fault."""
    silent_seconds: Annotated[_Positive | None, _OrNever] = 600.0
    """A trial without a step for so long is ended; "never" for no such watch."""
    slow_factor: Annotated[float | None, Field(gt=1, allow_inf_nan=False), _OrNever] = 5.0
    """A trial that takes so many times what is expected is ended; "never" for no such watch."""

    def caps(self, price_per_gpu_hour: float | None, started: datetime) -> Caps:
        """The caps on spending and time of a sweep, on a clock of seconds since `started`."""
        deadline: float | None = None
        if isinstance(self.deadline, datetime):
            deadline = (self.deadline.astimezone(UTC) - started).total_seconds()
        elif self.deadline is not None:
            deadline = 3600 * self.deadline
        return Caps(
            flops=self.flops,
            gpu_hours=self.gpu_hours,
            money=self.money,
            price_per_gpu_hour=price_per_gpu_hour,
            deadline=deadline,
        )


class Checkpoints(Strict):
    """When trials write their state, how much of it is kept, and whether their models are."""

    every_seconds: Annotated[_Positive | None, _OrNever] = 300.0
    """Wall time between checkpoints of a trial; "never" for none by time."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps between checkpoints, as well."""
    max_overhead: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the time that saving may take: after one that took t s, none for t / 0.02 s."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints of each trial that are kept: if one is damaged, there is another."""
    after: Literal["remove", "keep"] | None = None
    """What becomes of a trial's when it is measured. By default those of a trunk are kept, so that
    it can be extended, and others removed; a probe is never extended."""
    models: bool = True
    """Whether the weights of every measured model stay in the project."""

    def removes(self, trial: Trial) -> bool:
        """Whether a trial's checkpoints go when it is measured."""
        return self.after == "remove" or (
            self.after is None and (not trial.horizons or trial.probe is not None)
        )


class ClusterSpec(Strict):
    """The cluster to plan for; a sweep runs on the one that is there, as far as Ray can tell it."""

    gpu: str | None = None
    """Type of its GPUs, such as "H100"; one that is not in the table needs `gpu_memory`."""
    gpu_memory: _Positive | None = None
    """GB of memory of each GPU, of a type that is not in the table or that has less than usual."""
    mps: bool = False
    """Whether NVIDIA's Multi-Process Service runs on its nodes. A running cluster tells itself."""
    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] = 8
    """Counted where `gpu` is given."""
    nodes: Annotated[int, Field(ge=1, le=20_000)] = 1
    """Equal machines."""
    cpus_per_node: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Cores of each. Default: 8 a GPU."""
    autoscaling: bool = False
    """Whether a running cluster grows to these machines: trials that need them then wait."""
    price_per_gpu_hour: _Positive | None = None
    """What an hour of one GPU costs, in any currency."""

    @model_validator(mode="after")
    def _of_something(self) -> ClusterSpec:
        if self.gpu is not None and self.gpu_memory is None and known_type(self.gpu) is None:
            raise ValueError(
                f"has gpu = {self.gpu!r}, which is no known type: give gpu_memory, the GB of each, "
                f"as well, or one of {KNOWN}"
            )
        if self.gpu is not None or self.cpus_per_node is not None:
            return self
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            if value != ClusterSpec.model_fields[name].default:
                raise ValueError(
                    f"has {name} = {value}, but nothing says of what: give gpu, such as H100, or "
                    "cpus_per_node"
                )
        return self

    def cluster(self) -> Cluster | None:
        """Its machines; None where neither GPUs nor cores are given."""
        if self.gpu is None and self.cpus_per_node is None:
            return None
        return uniform(
            nodes=self.nodes,
            gpus=self.gpus_per_node if self.gpu else 0,
            gpu_type=self.gpu,
            cpus=self.cpus_per_node,
            gpu_memory=self.gpu_bytes,
            mps=self.mps,
        )

    @property
    def gpu_bytes(self) -> float | None:
        """Memory of each GPU in bytes, where the file gives it."""
        return None if self.gpu_memory is None else GIGABYTE * self.gpu_memory
