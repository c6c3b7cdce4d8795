"""Which trial Ray Tune runs next: the queue's word.

A trial of the class of one that ends takes over its actor: it is handed to Tune between the row
and the end, since Tune keeps an actor only where a trial for it is waiting. They are of one line,
which no other trial is: else Tune would give the actor to whoever waits for a process that is still
starting. Any other trial is handed out when the actor's placement group is gone: what is asked for
before that, Ray may put elsewhere, on the very GPUs that the queue is keeping for a wide trial.

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
LEAVE_SECONDS = 30.0
"""For an actor to go, after which its room is taken to be free."""
BLAMED: frozenset[Kind] = frozenset({"raised", "silent", "slow"})
"""Ends that count against `limits.retries`; the others are not the trial's fault."""


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
        gone: Callable[[str], bool],
    ) -> None:
        """Hand out `orders` as the `queue` says.

        `cluster` gives the nodes that there are, `clock` seconds, and `gone` says of a placement
        group, by its id, whether its room is free again.
        """
        super().__init__()
        self.queue = queue
        self.clock = clock
        """The queue's: seconds since the sweep started."""
        self._orders = orders
        self._limits = limits
        self._stop = stop
        self._cluster = cluster
        self._gone = gone
        self._known = cluster()
        self._looked = clock()
        self._keys: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()
        self._nodes: dict[str, str] = {}
        self._groups: dict[str, str] = {}
        self._lines: dict[str, str] = {}  # the trial that the actor was started for
        self._rows: set[str] = set()  # of this sweep's trials
        self._ending: list[str] = []  # those that may still be relayed
        self._leaving: dict[str, float] = {}  # since when: those whose actor is to go

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher, though nothing is ever restored from it

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; None while there is none; FINISHED after the last."""
        over = not self.queue.waiting and self.queue.running <= self._rows
        if self._stop.wanted or over:
            return Searcher.FINISHED
        now = self.clock()
        self._look(now)
        key = self._relayed(now)
        if key is None:
            self._let_go(now)
            key = self.queue.next(now)
            if key is None:
                return None
            self._lines[key] = trial_id
        self._keys[trial_id] = key
        placement = self.queue.job(key).placement
        asked = {
            "bundles": placement.bundles,
            "strategy": placement.strategy,
            "node": self.queue.where(key),
            "line": self._lines[key],
        }
        return {"key": key, "order": self._orders[key].dump(), "placement": json.dumps(asked)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tune is done with a trial; of one that failed `failed` tells more."""
        key = self._keys.pop(trial_id)
        if key in self.queue.running and (key in self._rows or not error):
            self._leaving[key] = self.clock()

    def measured(self, key: str) -> None:
        """A trial's row is in the ledger: its actor is about to be free."""
        self._rows.add(key)
        self._ending.append(key)

    def started(self, key: str, actor: str) -> None:
        """A trial has its actor; where that one is may be known from earlier trials."""
        self._place(key, self._nodes.get(actor))

    def seen(self, key: str, actor: str, node: str, group: str) -> None:
        """A trial's actor says on which node and in which placement group it is."""
        self._groups[key] = group
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

    def _relayed(self, now: float) -> str | None:
        """The trial that takes over the actor of one that was just measured."""
        while self._ending:
            key = self._ending.pop(0)
            follower = self.queue.relay(key, now)
            if follower is not None:
                self._leaving.pop(key, None)
                self._lines[follower] = self._lines[key]
                return follower
        return None

    def _let_go(self, now: float) -> None:
        """Have the room back of those whose actors are gone."""
        for key, since in list(self._leaving.items()):
            group = self._groups.get(key)
            if group is None or now - since > LEAVE_SECONDS or self._gone(group):
                del self._leaving[key]
                self.queue.ended(key, now)

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
