"""A trainer that samples a known law with noise: for tests, planning and trying faults."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trainers.flops import flops_per_token, params
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import UnreadableError, Workspace, resume, verify

TICK_SECONDS = 0.02
"""A simulated trial comes up for air this often, so that it can be stopped."""
CHECKPOINT_VERSION = 1
CONDUCT = frozenset({"seconds", "points", "gpus", "diverge", "fail", "hang"})
"""Settings that say how a trial runs; the others are the truth that it samples."""
_POSITIVE = frozenset({"A", "B", "alpha", "beta", "gamma"})
_NOT_NEGATIVE = frozenset({"E", "noise", "seconds", "gpus"})
_CHANCES = frozenset({"diverge", "fail", "hang"})


@dataclass(frozen=True, kw_only=True)
class SimulatedSettings:
    """The truth that `simulated` samples: L = E + (A N^-alpha + B D^-beta)^gamma, N non-embedding.

    The defaults are the corrected constants of Besiroglu et al. (2024, arXiv 2404.10102).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - a class attribute for sweep.toml
    E: float = 1.8172
    A: float = 482.01
    B: float = 2085.43
    alpha: float = 0.3478
    beta: float = 0.3658
    gamma: float = 1.0
    noise: float = 0.003
    """Standard deviation of ln L."""
    seconds: float = 0.0
    """Time that a trial takes."""
    points: int = 20
    """Points of the curve."""
    gpus: float = 0.0
    """GPUs that a trial asks for, a share of one or several, and leaves idle; 0 is one core."""
    diverge: float = 0.0
    """Chance that a trial diverges."""
    fail: float = 0.0
    """Chance that a trial raises, at every attempt."""
    hang: float = 0.0
    """Chance that a trial's first attempt stops for ever half-way, after leaving a checkpoint."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"has points = {self.points}, but it should be at least 1")
        for name, value in dataclasses.asdict(self).items():
            if name in _POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"has {name} = {value:g}, but it should be finite and above 0")
            if name in _NOT_NEGATIVE and not 0 <= value < math.inf:
                raise ValueError(f"has {name} = {value:g}, but it should be finite and at least 0")
            if name in _CHANCES and not 0 <= value <= 1:
                raise ValueError(f"has {name} = {value:g}, a chance, which is between 0 and 1")

    @staticmethod
    def of(trial: Trial) -> SimulatedSettings:
        """What a simulated trial is told; the default where it is told nothing."""
        told: dict[str, Any] = dict(trial.settings)
        return SimulatedSettings(**told)

    def loss(self, n: float, d: float) -> float:
        """The law's loss in nats/token at N parameters and D tokens."""
        return float(self.E + (self.A * n**-self.alpha + self.B * d**-self.beta) ** self.gamma)


class Simulated:
    """Draws a loss from the law in the trial's settings. See `Trainer`."""

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        """Yield a curve along the law, then a measurement with noise seeded by the trial's key."""
        truth = SimulatedSettings.of(trial)
        rng = np.random.default_rng(int(trial.key, 16))
        noise = rng.standard_normal()
        fails, diverges, hangs = rng.random(3) < (truth.fail, truth.diverge, truth.hang)
        if fails:
            raise RuntimeError(f"simulated failure of trial {trial.key}")
        course = _Course(trial, truth)
        first = resume(workspace, partial(_read, trial=trial)) or 0
        # Deadlines, not pauses: what the caller does between events does not lengthen the trial.
        started = time.monotonic() - truth.seconds * first / course.ticks
        for tick in range(first + 1, course.ticks + 1):
            pause = started + truth.seconds * tick / course.ticks - time.monotonic()
            if pause > 0:  # even sleep(0) takes a tenth of a millisecond
                time.sleep(pause)
            step = course.step(tick)
            if tick % course.ticks_per_point == 0:
                yield course.point(tick // course.ticks_per_point)
            hanging = bool(hangs) and first == 0 and 2 * tick >= course.ticks
            if hanging or workspace.due(step):
                workspace.save(step, partial(_write, trial, tick))
            while hanging:
                time.sleep(3600)
            yield Step(step)
        loss = truth.loss(course.params, trial.tokens) * math.exp(truth.noise * noise)
        curve = [course.point(i) for i in range(1, truth.points + 1)]
        curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
        resumed_from = course.step(first) if first else 0
        yield Measurement(
            tokens=trial.tokens,
            status="diverged" if diverges else "complete",
            reason="the simulation was told to diverge" if diverges else None,
            loss=None if diverges else loss,
            loss_stderr=None if diverges else truth.noise * loss,
            bits_per_byte=None,
            seconds=time.monotonic() - started,
            mfu=None,
            device="simulated",
            curve=tuple(curve),
            versions=_versions(),
            steps=trial.hyperparameters.steps - resumed_from,
            resumed_from=resumed_from,
        )


class _Course:
    """What a simulated training looks like on its way: ticks, each of several steps, and points."""

    def __init__(self, trial: Trial, truth: SimulatedSettings) -> None:
        self._trial, self._truth = trial, truth
        self.params = params(trial.shape).non_embedding
        self.ticks_per_point = max(1, math.ceil(truth.seconds / truth.points / TICK_SECONDS))
        self.ticks = truth.points * self.ticks_per_point

    def step(self, tick: int) -> int:
        """Optimiser steps done after `tick`, from 1 on."""
        return max(1, self._trial.hyperparameters.steps * tick // self.ticks)

    def point(self, index: int) -> Progress:
        """Point of the curve, from 1 to the setting `points`."""
        step = self.step(index * self.ticks_per_point)
        tokens = step * self._trial.hyperparameters.batch_tokens
        return Progress(
            step=step,
            tokens=tokens,
            flops=tokens * flops_per_token(self._trial.shape),
            train_loss=self._truth.loss(self.params, tokens),
        )


def _write(trial: Trial, tick: int, path: Path) -> None:
    content = {"version": CHECKPOINT_VERSION, "key": trial.key, "tick": tick}
    path.write_text(json.dumps(content))


def _read(path: Path, trial: Trial) -> int:
    try:
        content: Any = json.loads(path.read_text())
    except ValueError as error:
        raise UnreadableError(f"it is no JSON ({error})") from error
    return int(verify(content, key=trial.key, version=CHECKPOINT_VERSION)["tick"])


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "isoflop": version("isoflop")}
