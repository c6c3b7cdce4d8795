"""A trainer that samples a known law with noise: for tests, planning and trying faults."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from trainers.flops import flops_per_token, params
from trainers.trial import Measurement, Progress, Trial

CURVE_POINTS = 20


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
    diverge: float = 0.0
    """Chance that a trial diverges."""
    fail: float = 0.0
    """Chance that a trial raises, at every attempt."""

    def __post_init__(self) -> None:
        positive = (self.A, self.B, self.alpha, self.beta, self.gamma)
        if not all(math.isfinite(v) and v > 0 for v in positive):
            raise ValueError("needs A, B, alpha, beta, gamma above 0")
        if not all(math.isfinite(v) and v >= 0 for v in (self.noise, self.seconds, self.E)):
            raise ValueError("needs noise, seconds, E of at least 0")
        if not (0 <= self.diverge <= 1 and 0 <= self.fail <= 1):
            raise ValueError("needs chances to diverge and to fail between 0 and 1")

    def loss(self, n: float, d: float) -> float:
        """The law's loss in nats/token at N parameters and D tokens."""
        return float(self.E + (self.A * n**-self.alpha + self.B * d**-self.beta) ** self.gamma)


class Simulated:
    """Draws a loss from the law in the trial's settings. See `Trainer`."""

    def train(self, trial: Trial, workspace: Path) -> Iterator[Progress | Measurement]:
        """Yield a curve along the law, then a measurement with noise seeded by the trial's key."""
        started = time.perf_counter()
        truth = SimulatedSettings(**dict(trial.settings))
        rng = np.random.default_rng(int(trial.key, 16))
        n = params(trial.shape).non_embedding
        noise, luck = rng.standard_normal(), rng.random()
        if luck < truth.fail:
            raise RuntimeError(f"simulated failure of trial {trial.key}")
        loss = truth.loss(n, trial.tokens) * math.exp(truth.noise * noise)
        h = trial.hyperparameters
        curve = []
        for i in range(1, CURVE_POINTS + 1):
            time.sleep(truth.seconds / CURVE_POINTS)
            step = max(1, h.steps * i // CURVE_POINTS)
            tokens = step * h.batch_tokens
            point = Progress(
                step=step,
                tokens=tokens,
                flops=tokens * flops_per_token(trial.shape),
                train_loss=truth.loss(n, tokens),
            )
            curve.append(point)
            yield point
        curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
        diverged = rng.random() < truth.diverge
        yield Measurement(
            tokens=trial.tokens,
            status="diverged" if diverged else "complete",
            reason="the simulation was told to diverge" if diverged else None,
            loss=None if diverged else loss,
            loss_stderr=None if diverged else truth.noise * loss,
            bits_per_byte=None,
            seconds=time.perf_counter() - started,
            mfu=None,
            device="simulated",
            curve=tuple(curve),
            versions={"python": platform.python_version(), "isoflop": version("isoflop")},
        )
