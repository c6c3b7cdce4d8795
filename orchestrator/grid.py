"""Which trial Ray Tune runs next: the queue's word, with a little ahead so that no actor waits.

Tune itself never tries again: what fails or is lost comes back here, and is handed out again as
often as the limits allow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from cluster.machines import Cluster
from cluster.queue import Queue
from orchestrator.attempts import Kind
from orchestrator.spec_running import Limits
from orchestrator.stop import Stop
from orchestrator.worker import Order

LOOK_SECONDS = 5.0
"""Between looks at which nodes there are."""
BLAMED: frozenset[Kind] = frozenset({"raised", "silent", "slow"})
"""Ends that count against `limits.retries`; the others are not the trial's fault."""
LEAST_AHEAD = 4
RUNNING_PER_AHEAD = 8
"""Trials handed to Tune before there is room for them: so many at least, or one for so many that
run. Tune keeps an actor for the next trial only where one of its class is waiting already."""


class Grid(Searcher):
    """Tune's view of a queue of trials."""

    def __init__(
        self,
        queue: Queue,
        orders: Mapping[str, Order],
        *,
        limits: Limits,
        stop: Stop,
        cluster: Callable[[], Cluster],
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self.queue = queue
        self.clock = clock
        """The queue's: seconds since the sweep started."""
        self._orders = orders
        self._limits = limits
        self._stop = stop
        self._cluster = cluster
        self._known = cluster()
        self._looked = clock()
        self._keys: dict[str, str] = {}
        self._staged: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()
        self._nodes: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher, though nothing is ever restored from it

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; None while there is none; FINISHED after the last."""
        if self._stop.wanted or not (self.queue.waiting or self.queue.running):
            return Searcher.FINISHED
        now = self.clock()
        self._look(now)
        key = self.queue.next(now)
        if key is None and len(self._staged) < self._ahead:
            key = self.queue.ahead(now)
        if key is None:
            return None
        self._staged.add(key)
        self._keys[trial_id] = key
        placement = self.queue.job(key).placement
        asked = {
            "bundles": placement.bundles,
            "strategy": placement.strategy,
            "node": self.queue.where(key),
        }
        return {"key": key, "order": self._orders[key].dump(), "placement": json.dumps(asked)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial ended; of one that failed `failed` tells more."""
        key = self._keys.pop(trial_id)
        self._staged.discard(key)
        if not error:
            self.queue.ended(key, self.clock())

    def started(self, key: str, actor: str) -> None:
        """A trial has its actor; where that one is may be known from earlier trials."""
        self._staged.discard(key)
        self._place(key, self._nodes.get(actor))

    def seen(self, key: str, actor: str, node: str) -> None:
        """A trial's actor says on which node it is."""
        if self._nodes.get(actor) != node:
            self._nodes[actor] = node
            self._place(key, node)

    def failed(self, key: str, kind: Kind, *, step: int = 0, hopeless: bool = False) -> bool:
        """A trial came back without a row. Whether it will be tried again.

        Not if it is `hopeless`, nor when it has failed too often. Losses count only while the
        trial gets no further: those before its newest checkpoint, at `step`, are forgiven.
        """
        if step > self._reached[key]:
            self._reached[key] = step
            self._losses[key] = 0
        blame = self._failures if kind in BLAMED else self._losses
        blame[key] += 1
        again = not (
            hopeless
            or self._stop.wanted
            or self._failures[key] > self._limits.retries
            or self._losses[key] > self._limits.restarts
        )
        if again:
            self.queue.lost(key, self.clock())
        else:
            self.queue.ended(key, self.clock())
        return again

    @property
    def _ahead(self) -> int:
        return max(LEAST_AHEAD, len(self.queue.running) // RUNNING_PER_AHEAD)

    def _place(self, key: str, node: str | None) -> None:
        alone = self.queue.job(key).placement.nodes == 1
        self.queue.started(key, [node] if node and alone else [], self.clock())

    def _look(self, now: float) -> None:
        """Let the queue know of nodes that joined or left."""
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            found = self._cluster()
            if found != self._known:
                self._known = found
                self.queue.move(found)
