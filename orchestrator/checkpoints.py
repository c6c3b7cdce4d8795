"""A trial's checkpoints in the project's storage, where the next attempt finds them on any node.

Its models too, which stay.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from orchestrator.attempts import Attempts
from orchestrator.ledger import Ledger
from orchestrator.models import file_name
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import Result, Storage, patiently, reason_of

REMOVERS = 16


def directory_of(key: str) -> str:
    """Where the checkpoints of a trial are."""
    return f"checkpoints/{key}"


@dataclass(kw_only=True)
class StoredWorkspace:
    """A `Workspace` whose checkpoints are `checkpoints/<key>/<step>` in the project's storage.

    One is due when the settings say so, and at once when the sweep is told to stop. What cannot be
    stored is missed, not mourned: training goes on, and the next is tried when it is due. What
    cannot be listed or fetched now is waited for: that is cheaper than to train it again. So is a
    model that cannot be stored: every row should have its own.
    """

    directory: Path
    storage: Storage
    key: str
    settings: Checkpoints
    stop: Callable[[], bool]
    """Whether the sweep wants this trial to stop."""
    tell: Callable[[str], None] = warnings.warn
    """Gets sentences for a person: what the storage does not do now, and what a trainer says."""
    paused: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, init=False)
    """Entered while the storage takes its time, or the trainer compiles."""
    resumed_from: int | None = field(default=None, init=False)
    """Step of the checkpoint that was handed out last, and taken."""
    _last: int = field(default=0, init=False)
    """The step of the last checkpoint that was tried, or started from."""
    _saved_at: float = field(default_factory=lambda: time.monotonic(), init=False)
    _pause: float = field(default=0.0, init=False)
    """Seconds before the next one by what the last one cost."""

    def measured(self, tokens: int) -> bool:
        """See `Workspace`: by the ledger."""
        find = partial(Ledger(self.storage).find, (self.key, tokens))
        return self._waited(find, "read the ledger") is not None

    def due(self, step: int) -> bool:
        """See `Workspace`."""
        if self.stop():
            return True
        rest = time.monotonic() - self._saved_at
        if rest < self._pause:
            return False
        every, seconds = self.settings.every_steps, self.settings.every_seconds
        # A trainer may not ask at each step.
        by_steps = every is not None and step // every > self._last // every
        return by_steps or (seconds is not None and rest >= seconds)

    def stopping(self) -> bool:
        """See `Workspace`."""
        return self.stop()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """See `Workspace`. A failure of the storage is told, and no more.

        Keeps the newest few of this step and before. Later ones are of a training that had gone
        further when this one, to an earlier horizon, began anew.
        """
        started, self._last = time.monotonic(), step
        path = self.directory / f"{step}.{uuid.uuid4().hex}"
        with self.paused():
            try:
                write(path)
                self.storage.upload(path, f"{directory_of(self.key)}/{step:012d}")
                before = [name for name in self._names() if int(name) <= step]
                for old in before[: -self.settings.keep]:
                    self.storage.remove(f"{directory_of(self.key)}/{old}")
            except OSError as error:
                self.tell(f"cannot store checkpoints: {reason_of(error)}; trying again")
            finally:
                path.unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        self._pause = (self._saved_at - started) / self.settings.max_overhead

    def checkpoints(self) -> Iterator[Path]:
        """See `Workspace`. Waits for a storage that does not answer, unless it is to stop."""
        for name in reversed(self._waited(self._names, "read checkpoints")):
            path = self.directory / name
            if self._waited(partial(self._fetch, name, path), "read checkpoints"):
                found = self.resumed_from, self._last
                self.resumed_from = self._last = int(name)
                try:
                    yield path
                finally:  # it may be large, and nobody clears up after ranks on other nodes
                    path.unlink(missing_ok=True)
                self.resumed_from, self._last = found  # asked for another: it was of no use

    def set_aside(self, path: Path, reason: str) -> None:
        """See `Workspace`: into `unreadable/` below, where no attempt looks."""
        base = directory_of(self.key)
        try:
            with self.paused():
                self.storage.upload(path, f"{base}/unreadable/{path.name}")
                self.storage.remove(f"{base}/{path.name}")
        except OSError as error:
            reason += f"; it stays where it is: {reason_of(error)}"
        self.tell(f"a checkpoint of {self.key} at step {int(path.name)} is set aside: {reason}")

    def out_of_memory(self) -> int:
        """See `Workspace`: by the records of its attempts."""
        before = self._waited(partial(Attempts(self.storage).of, self.key), "read attempts")
        return sum(attempt.out_of_memory for attempt in before)

    @property
    def keeps_models(self) -> bool:
        """See `Workspace`."""
        return self.settings.models

    def keep_model(self, tokens: int, write: Callable[[Path], None]) -> None:
        """See `Workspace`: `models/<key>-<tokens>.safetensors`. Waits as for checkpoints."""
        path = self.directory / f"{tokens}.{uuid.uuid4().hex}"

        def store() -> None:
            try:
                write(path)
                self.storage.upload(path, file_name((self.key, tokens)))
            finally:
                path.unlink(missing_ok=True)

        self._waited(store, "store the model")

    def _waited(self, action: Callable[[], Result], what: str) -> Result:
        with self.paused():
            return patiently(
                action,
                tell=lambda error: self.tell(f"cannot {what}: {reason_of(error)}; trying again"),
                unless=self.stop,
            )

    def _fetch(self, name: str, path: Path) -> bool:
        """Have a checkpoint at a local path; False if a newer one has replaced it meanwhile."""
        try:
            self.storage.download(f"{directory_of(self.key)}/{name}", path)
        except FileNotFoundError:
            return False
        return True

    def _names(self) -> list[str]:
        return self.storage.names(directory_of(self.key))


def remove(storage: Storage, keys: Iterable[str]) -> None:
    """Remove all checkpoints of trials, those set aside too."""
    with ThreadPoolExecutor(REMOVERS) as pool:
        list(pool.map(storage.remove_all, map(directory_of, keys)))
