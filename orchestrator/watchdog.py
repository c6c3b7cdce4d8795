"""Ends a worker whose trial gives no sign of life, and says where it hung."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOKS = 20
"""How many times within the permitted silence the watchdog looks."""
EXIT_STATUS = 77
"""Of a process that the watchdog ended."""


class Watchdog:
    """Watches the thread that enters it. Use as a context manager.

    A thread of its own: it needs Python's lock, which a hang within a C library may hold. The
    driver, which hears nothing then either, kills the process a little later.
    """

    def __init__(self, seconds: float | None, tell: Callable[[str, str], None]) -> None:
        """Permit `seconds` of silence, or any; then `tell` the error and the stack, and exit."""
        self._seconds = seconds
        self._tell = tell
        self._over = threading.Event()
        self._pauses = 0  # pauses may lie within others
        self._watched = 0
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        self._last = time.monotonic()
        if self._seconds is not None:
            args = (self._seconds,)
            threading.Thread(target=self._look, args=args, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def heard(self) -> None:
        """The trial is alive."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While something else than the trial takes its time."""
        self._pauses += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._pauses -= 1

    def _look(self, permitted: float) -> None:
        while not self._over.wait(permitted / LOOKS):
            if self._pauses:
                continue
            silent = time.monotonic() - self._last  # after the pause: its end is a sign of life
            if silent < permitted:
                continue
            frame = sys._current_frames().get(self._watched)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            try:
                self._tell(f"no sign of life for {silent:.0f} s (limits.silent_seconds)", stack)
            finally:
                os._exit(EXIT_STATUS)
