"""Whether a sweep is to end before its trials have: an interrupt, or another driver."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from orchestrator.lease import Lease


@dataclass
class Stop:
    """Asked by everything that would start something new."""

    lease: Lease
    interrupted: bool = False
    """Set by a signal."""
    _since: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether no trial should start any more, and those that run should end."""
        return self.interrupted or self.lease.lost.is_set()

    @property
    def seconds(self) -> float:
        """Since it was first seen to be wanted; 0 before."""
        if not self.wanted:
            return 0.0
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since


@contextmanager
def interruptible(stop: Stop, quit_now: Callable[[], None]) -> Iterator[None]:
    """Have the first Ctrl-C or SIGTERM want a stop, and the second end everything now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # Only a flag: the interrupted code may hold any lock.
        if stop.interrupted:
            quit_now()
        stop.interrupted = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
