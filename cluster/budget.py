"""What a sweep may spend: caps, and what is spent or promised under them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

HOUR = 3600.0
TOLERANCE = 1e-9
"""Relative: a cap that equals what is asked for is not broken by rounding."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Bounds of a sweep; None is none."""

    flops: float | None = None
    gpu_hours: float | None = None
    money: float | None = None
    """In the currency of `price_per_gpu_hour`, without which it bounds nothing."""
    price_per_gpu_hour: float | None = None
    deadline: float | None = None
    """Seconds on the caller's clock; what is expected to end later is not started."""


@dataclass
class Purse:
    """What is spent or promised so far."""

    caps: Caps
    flops: float = 0.0
    gpu_seconds: float = 0.0

    @property
    def unlimited(self) -> bool:
        """Whether nothing can break a cap on spending."""
        caps = self.caps
        return caps.flops is None and caps.gpu_hours is None and self._paid(0.0) is None

    def copy(self) -> Purse:
        """An equal one."""
        return dataclasses.replace(self)

    def commit(self, flops: float, gpu_seconds: float) -> None:
        """Promise what a trial is expected to take."""
        self.flops += flops
        self.gpu_seconds += gpu_seconds

    def settle(self, expected: float, taken: float) -> bool:
        """Replace promised GPU-seconds by those taken; whether that changes anything."""
        self.gpu_seconds += taken - expected
        return not math.isclose(taken, expected, rel_tol=TOLERANCE)

    def broken(self, flops: float, gpu_seconds: float) -> str | None:
        """The first cap that so much more would break."""
        hours = (self.gpu_seconds + gpu_seconds) / HOUR
        asked = {
            "flops": (self.flops + flops, self.caps.flops),
            "gpu_hours": (hours, self.caps.gpu_hours),
            "money": (self._paid(hours) or 0.0, self.caps.money),
        }
        for name, (value, cap) in asked.items():
            if cap is not None and value > cap * (1 + TOLERANCE):
                return name
        return None

    def seconds_left(self, now: float) -> float:
        """Until the deadline."""
        return math.inf if self.caps.deadline is None else self.caps.deadline - now

    def _paid(self, hours: float) -> float | None:
        caps = self.caps
        if caps.money is None or caps.price_per_gpu_hour is None:
            return None
        return hours * caps.price_per_gpu_hour
