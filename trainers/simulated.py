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
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from trainers.flops import flops_per_token, params
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import UnreadableError, Workspace, resume, verify

MOST_POINTS = 100_000
"""Points of a simulated curve, which is kept in a row."""
TICK_SECONDS = 0.02
"""A simulated trial comes up for air this often, so that it can be stopped."""
CHECKPOINT_VERSION = 2
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
    """Chance that an attempt from the beginning stops for ever half-way, after a checkpoint."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"has points = {self.points}, but it should be at least 1")
        if self.points > MOST_POINTS:
            raise ValueError(f"has points = {self.points}, but it should be at most {MOST_POINTS}")
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
        """Yield a curve along the law, then measurements with noise seeded by the trial's key."""
        truth = SimulatedSettings.of(trial)
        rng = np.random.default_rng(int(trial.key, 16))
        noise = rng.standard_normal()
        fails, diverges, hangs = rng.random(3) < (truth.fail, truth.diverge, truth.hang)
        if fails:
            raise RuntimeError(f"simulated failure of trial {trial.key}")
        course = _Course(trial, truth)
        first, _ = resume(workspace, partial(_read, trial=trial), course.fits) or (0, ())
        # Deadlines, not pauses: what the caller does between events does not lengthen the trial.
        started = time.monotonic() - truth.seconds * first / course.ticks
        told = resumed_from = course.step(first) if first else 0
        # What is measured at a tick is measured after its checkpoint: so also on going on from it.
        for tick in range(first, course.ticks + 1):
            step = course.step(tick)
            if tick > first:
                pause = started + truth.seconds * tick / course.ticks - time.monotonic()
                if pause > 0:  # even sleep(0) takes a tenth of a millisecond
                    time.sleep(pause)
                if tick % course.ticks_per_point == 0:
                    yield course.point(step)
                hanging = bool(hangs) and first == 0 and 2 * tick >= course.ticks
                if hanging or workspace.due(step):
                    workspace.save(step, partial(_write, trial, tick))
                while hanging:
                    time.sleep(3600)
                yield Step(step)
            for tokens in course.measured(tick):
                if trial.horizons:
                    noise = np.random.default_rng([int(trial.key, 16), tokens]).standard_normal()
                loss = truth.loss(course.params, tokens) * math.exp(truth.noise * noise)
                curve = course.curve(tokens)
                curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
                marginal = trial.marginal_steps[tokens]
                yield Measurement(
                    tokens=tokens,
                    status="diverged" if diverges else "complete",
                    reason="the simulation was told to diverge" if diverges else None,
                    loss=None if diverges else loss,
                    loss_stderr=None if diverges else truth.noise * loss,
                    bits_per_byte=None,
                    seconds=(time.monotonic() - started) * marginal / step,
                    mfu=None,
                    device="simulated",
                    curve=tuple(curve),
                    versions=_versions(),
                    steps=step - told,
                    resumed_from=resumed_from,
                    flops_spent=marginal * course.flops_per_step if trial.horizons else None,
                )
                told = step


class _Course:
    """What a simulated training looks like on its way: ticks, each of several steps, and points."""

    def __init__(self, trial: Trial, truth: SimulatedSettings) -> None:
        self._trial, self._truth = trial, truth
        self.params = params(trial.shape).non_embedding
        self.ticks_per_point = max(1, math.ceil(truth.seconds / truth.points / TICK_SECONDS))
        self.ticks = truth.points * self.ticks_per_point
        self.flops_per_step = flops_per_token(trial.shape) * trial.hyperparameters.batch_tokens
        done = accumulate(trial.marginal_steps.values())
        ends = [math.ceil(self.ticks * steps / trial.total_steps) for steps in done]
        self._ends = dict(zip(trial.marginal_steps, ends, strict=True))
        """Of each horizon, the tick at which it is measured."""

    def fits(self, saved: tuple[int, tuple[int, ...]]) -> bool:
        """Whether a checkpoint is of the same horizons, none of which lies before it."""
        tick, horizons = saved
        return horizons == self._trial.horizons and tick <= min(self._ends.values())

    def step(self, tick: int) -> int:
        """Optimiser steps done after `tick`, from 1 on."""
        return max(1, self._trial.total_steps * tick // self.ticks)

    def measured(self, tick: int) -> list[int]:
        """Horizons that are reached at a tick."""
        return [tokens for tokens, end in self._ends.items() if end == tick]

    def curve(self, tokens: int) -> list[Progress]:
        """All points of a training to a horizon."""
        n, steps = self._truth.points, tokens // self._trial.hyperparameters.batch_tokens
        return [self.point(max(1, steps * i // n)) for i in range(1, n + 1)]

    def point(self, step: int) -> Progress:
        """The point of a curve after so many steps of one training."""
        tokens = step * self._trial.hyperparameters.batch_tokens
        return Progress(
            step=step,
            tokens=tokens,
            flops=step * self.flops_per_step,
            train_loss=self._truth.loss(self.params, tokens),
        )


def _write(trial: Trial, tick: int, path: Path) -> None:
    content = {
        "version": CHECKPOINT_VERSION,
        "key": trial.key,
        "tick": tick,
        "horizons": trial.horizons,
    }
    path.write_text(json.dumps(content))


def _read(path: Path, trial: Trial) -> tuple[int, tuple[int, ...]]:
    try:
        content: Any = json.loads(path.read_text())
    except ValueError as error:
        raise UnreadableError(f"it is no JSON ({error})") from error
    found = verify(content, key=trial.key, version=CHECKPOINT_VERSION)
    return found["tick"], tuple(found["horizons"])


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "isoflop": version("isoflop")}
