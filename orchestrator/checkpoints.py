"""A trial's checkpoints in the project's storage, where the next attempt finds them on any node."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.spec_running import Checkpoints
from orchestrator.storage import Storage

REMOVERS = 16


def directory_of(key: str) -> str:
    """Where the checkpoints of a trial are."""
    return f"checkpoints/{key}"


@dataclass(kw_only=True)
class StoredWorkspace:
    """A `Workspace` whose checkpoints are `checkpoints/<key>/<step>` in the project's storage.

    One is due when the settings say so, and at once when the sweep is told to stop. What cannot be
    stored is missed, not mourned: training goes on, and the next is tried when it is due.
    """

    directory: Path
    storage: Storage
    key: str
    settings: Checkpoints
    stop: Callable[[], bool]
    """Whether the sweep wants this trial to stop."""
    paused: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, init=False)
    """Entered while the storage takes its time."""
    resumed_from: int | None = field(default=None, init=False)
    """Step of the checkpoint that was handed out last."""
    _asked: int = field(default=0, init=False)
    """The step at which it was asked last."""
    _saved_at: float = field(default_factory=lambda: time.monotonic(), init=False)
    _pause: float = field(default=0.0, init=False)
    """Seconds before the next one by what the last one cost."""

    def due(self, step: int) -> bool:
        """See `Workspace`."""
        if self.stop():
            return True
        asked, self._asked = self._asked, step
        rest = time.monotonic() - self._saved_at
        if rest < self._pause:
            return False
        every, seconds = self.settings.every_steps, self.settings.every_seconds
        # A trainer may not ask at each step.
        by_steps = every is not None and step // every > asked // every
        return by_steps or (seconds is not None and rest >= seconds)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """See `Workspace`. Keeps the newest few; a failure of the storage is a warning."""
        started = time.monotonic()
        path = self.directory / f"{step}.{uuid.uuid4().hex}"
        try:
            with self.paused():
                write(path)
                self.storage.upload(path, f"{directory_of(self.key)}/{step:012d}")
                for old in self._names()[: -self.settings.keep]:
                    self.storage.remove(f"{directory_of(self.key)}/{old}")
        except OSError as error:
            warnings.warn(f"no checkpoint at step {step}: {error}", stacklevel=2)
        finally:
            path.unlink(missing_ok=True)
            self._saved_at = time.monotonic()
            self._pause = (self._saved_at - started) / self.settings.max_overhead

    def checkpoints(self) -> Iterator[Path]:
        """See `Workspace`."""
        for name in reversed(self._names()):
            path = self.directory / name
            try:
                with self.paused():
                    self.storage.download(f"{directory_of(self.key)}/{name}", path)
            except FileNotFoundError:  # a newer one has replaced it since it was listed
                continue
            self.resumed_from = int(name)
            yield path

    def set_aside(self, path: Path, reason: str) -> None:
        """See `Workspace`: into `unreadable/` below, where no attempt looks."""
        base = directory_of(self.key)
        self.storage.upload(path, f"{base}/unreadable/{path.name}")
        self.storage.remove(f"{base}/{path.name}")
        warnings.warn(f"checkpoint {path.name} is set aside: {reason}", stacklevel=2)

    def _names(self) -> list[str]:
        return self.storage.names(directory_of(self.key))


def remove(storage: Storage, keys: Iterable[str]) -> None:
    """Remove all checkpoints of trials; those set aside stay for who wants to look."""

    def clear(key: str) -> None:
        for name in storage.names(directory_of(key)):
            storage.remove(f"{directory_of(key)}/{name}")

    with ThreadPoolExecutor(REMOVERS) as pool:
        list(pool.map(clear, keys))
