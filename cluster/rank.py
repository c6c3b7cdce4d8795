"""A rank of a gang: the process in which its trainer runs, and its view of the trial's workspace.

It knows its own work alone; who leads, waits and gives up is in `cluster.gang`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.addresses import reserve_port, socket_interfaces
from trainers.trial import Event, Step, Trainer, Trial
from trainers.visible_gpus import visible_gpus
from trainers.workspace import Workspace

STEP_EVERY_SECONDS = 0.2
"""Steps are passed on to the leader this often at most: each is a message between processes."""


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where a rank's process runs."""

    node: str
    """Ray's name of the node: nodes may share an address."""
    address: str
    pid: int
    port: int
    """One that nobody else is given as long as the rank's process lives."""
    gpu: str
    """The GPU that it is given, as CUDA_VISIBLE_DEVICES or AMD's HIP_VISIBLE_DEVICES names it;
    empty where it is given none."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Of life, from a rank that waits for the trial's workspace, or has something to say of it."""

    troubles: tuple[str, ...] = ()
    """What a person should know."""


MakeWorkspace = Callable[[Callable[[str], None]], Workspace]
"""Makes a trial's workspace, given what tells a person of its troubles."""


class Rank:
    """One process of a gang: a Ray actor. It answers while it trains."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._waits = False
        self._troubles: deque[str] = deque()
        self._reserved: socket.socket | None = None

    def home(self) -> Home:
        """Where it runs; that it answers at all says that it lives."""
        import ray

        # Ray leaves functions like this one without types.
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        if self._reserved is None:
            self._reserved = reserve_port()
        return Home(
            node=ray.get_runtime_context().get_node_id(),
            address=address,
            pid=os.getpid(),
            port=self._reserved.getsockname()[1],
            gpu=visible_gpus(os.environ),
        )

    def lead(
        self,
        environment: dict[str, str],
        trial: Trial,
        workspace: MakeWorkspace,
        make: Callable[[str], Trainer],
    ) -> Iterator[Event]:
        """Train as rank 0, until the end or the first checkpoint after `stop`."""
        _enter(environment)
        own = self._workspace(workspace, saves=True)
        passed_on = 0.0
        for event in make(trial.trainer).train(trial, own):
            last = isinstance(event, Step) and own.stop_seen
            if (
                last
                or not isinstance(event, Step)
                or time.monotonic() - passed_on > STEP_EVERY_SECONDS
            ):
                passed_on = time.monotonic()
                yield event
            if last:
                return

    def follow(
        self,
        environment: dict[str, str],
        trial: Trial,
        workspace: MakeWorkspace,
        make: Callable[[str], Trainer],
    ) -> None:
        """Train as another rank. Its events are rank 0's as well, and are dropped."""
        _enter(environment)
        own = self._workspace(workspace, saves=False)
        for _ in make(trial.trainer).train(trial, own):
            pass

    def stop(self) -> None:
        """Make a checkpoint due."""
        self._stop.set()

    def sign(self) -> Sign | None:
        """One of life, if it waits for its workspace or has troubles to tell, which it tells once.

        While it trains its events say that it lives; if it hangs there, nothing should.
        """
        troubles = []
        while self._troubles:
            troubles.append(self._troubles.popleft())
        return Sign(troubles=tuple(troubles)) if self._waits or troubles else None

    def _workspace(self, make: MakeWorkspace, *, saves: bool) -> _RankWorkspace:
        with self._waiting():
            inner = make(self._troubles.append)
        return _RankWorkspace(inner, self._stop, self._waiting, saves=saves)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


def _enter(environment: Mapping[str, str]) -> None:
    """Set a gang's environment, and the interface that Ray itself uses, where none is chosen."""
    import ray

    os.environ.update(environment)
    # Ray leaves functions like this one without types.
    for name, value in socket_interfaces(ray.util.get_node_ip_address()).items():  # type: ignore[no-untyped-call]
        os.environ.setdefault(name, value)


@dataclass
class _RankWorkspace:
    """A rank's view of the trial's workspace: rank 0 alone saves, also when it is to stop."""

    inner: Workspace
    stop: threading.Event
    waiting: Callable[[], AbstractContextManager[None]]
    """Entered while the storage takes its time."""
    saves: bool
    stop_seen: bool = False
    """Whether the trainer was told, when it asked last, that it is to stop."""

    @property
    def directory(self) -> Path:
        return self.inner.directory

    def measured(self, tokens: int) -> bool:
        with self.waiting():
            return self.inner.measured(tokens)

    def due(self, step: int) -> bool:
        if not self.saves:
            return False
        self.stop_seen = self.stop.is_set()
        return self.inner.due(step) or self.stop_seen

    def stopping(self) -> bool:
        self.stop_seen = self.saves and self.stop.is_set()
        return self.stop_seen

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        if self.saves:
            with self.waiting():
                self.inner.save(step, write)

    def checkpoints(self) -> Iterator[Path]:
        found = self.inner.checkpoints()
        while True:
            with self.waiting():
                path = next(found, None)
            if path is None:
                return
            yield path

    def set_aside(self, path: Path, reason: str) -> None:
        if self.saves:
            with self.waiting():
                self.inner.set_aside(path, reason)

    def paused(self) -> AbstractContextManager[None]:
        return self.waiting()

    def tell(self, message: str, /) -> None:
        self.inner.tell(message)

    def out_of_memory(self) -> int:
        with self.waiting():
            return self.inner.out_of_memory()

    @property
    def keeps_models(self) -> bool:
        return self.inner.keeps_models

    def keep_model(self, tokens: int, write: Callable[[Path], None]) -> None:
        if self.saves:
            with self.waiting():
                self.inner.keep_model(tokens, write)
