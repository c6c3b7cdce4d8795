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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray.tune.search import Searcher

from cluster.machines import Cluster
from cluster.placement import Placement
from cluster.queue import Queue
from orchestrator.attempts import BLAMED, Kind
from orchestrator.bad_gpus import MOST_HELD
from orchestrator.nodes import Nodes
from orchestrator.order import Order
from orchestrator.spec_running import Limits
from orchestrator.stop import Stop
from trainers.flops import flops_per_token, params
from trainers.trial import Trial

LOOK_SECONDS = 5.0
"""Between looks at which nodes there are."""
ASK_SECONDS = 0.1
"""Between questions whether an actor has gone."""
GIVE_UP_SECONDS = 30.0
"""For an actor to go, after which its room is taken to be free."""
SAME_FLOPS = 1.1
"""Trials whose FLOPs differ by less than this factor are of one budget, but for rounded steps."""


@dataclass
class _Actor:
    """What a trial that was handed out runs in."""

    line: str
    node: str | None = None
    group: str | None = None
    """Its placement group's id; both are known once it has told."""


@dataclass(frozen=True)
class _Leaving:
    """A trial that Tune is done with, until its actor has gone."""

    since: float
    again: bool
    """Whether it is to start again then."""


class _Size(NamedTuple):
    """Quantities of a trial with which a cause of failure may grow."""

    flops: float
    params: int
    tokens: int


class Grid(Searcher):
    """Tune's view of a queue of trials."""

    def __init__(
        self,
        queue: Queue,
        orders: Mapping[str, Order],
        *,
        limits: Limits,
        stop: Stop,
        clock: Callable[[], float],
        cluster: Callable[[], Cluster],
        gone: Callable[[str], bool],
        grow: Callable[[bool], None],
        idle: Callable[[], None],
        left_out: Callable[[str, str], None],
    ) -> None:
        """Hand out `orders` as the `queue` says.

        Parameters
        ----------
        queue, orders, limits, stop
            What to do, by key, and when not to.
        clock
            Seconds.
        cluster
            The nodes that there are.
        gone
            Whether the room of a placement group, by its id, is free again.
        grow
            Told whether trials wait for which the cluster may have to grow.
        idle
            Called now and then while Tune has no trial, and therefore calls nobody else.
        left_out
            Told a node's id, and why and for how long nothing is started there.
        """
        super().__init__()
        self.queue = queue
        self.clock = clock
        """The queue's: seconds since the sweep started."""
        self._orders, self._limits, self._stop = orders, limits, stop
        self._cluster, self._gone, self._grow, self._idle = cluster, gone, grow, idle
        self._known = cluster()
        self._left_out = Nodes(clock, left_out)
        self._out: frozenset[str] = frozenset()  # of these, those that the queue knows of
        self._looked = self._asked = clock()
        self._keys: dict[str, str] = {}  # by Tune's name of a trial, while Tune has it
        self._rows: set[str] = set()
        self._ending: list[str] = []  # those with a row whose actor may be taken over
        self._leaving: dict[str, _Leaving] = {}
        self._actors: dict[str, _Actor] = {}
        self._nodes: dict[str, str] = {}  # by actor
        self._free_lines: dict[Placement, list[str]] = {}
        self._holds: set[str] = set()  # names in the queue of room that workers keep from others
        self._bad_gpus: dict[str, set[str]] = {}  # those that ended a trial, by key
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher, though nothing is ever restored from it

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; None while there is none; FINISHED after the last."""
        if self._stop.wanted:
            return Searcher.FINISHED
        now = self.clock()
        self._look(now)
        key = self._relayed(now) or self._started_anew(trial_id, now)
        if key is None:
            if not self._keys:
                self._idle()
            return None if self._unfinished else Searcher.FINISHED
        self._keys[trial_id] = key
        placement = self.queue.job(key).placement
        asked = {
            "bundles": placement.bundles,
            "strategy": placement.strategy,
            "node": self.queue.where(key),
            "line": self._actors[key].line,
        }
        return {"key": key, "order": self._orders[key].dump(), "placement": json.dumps(asked)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tune is done with a trial; of one that failed `failed` tells more."""
        key = self._keys.pop(trial_id)
        if key in self._holds or key in self._rows:
            if key in self._holds or key in self.queue.running:
                self._leave(key, again=False)
        elif not error and not self._stop.wanted:  # it stopped, and nobody had wanted it to
            self.failed(key, "node lost")
        elif not error:
            self._leave(key, again=False)

    def started(self, key: str, actor: str) -> None:
        """A trial has its actor; where that one is may be known from earlier trials."""
        self._place(key, self._nodes.get(actor))

    def seen(self, key: str, actor: str, node: str, group: str) -> None:
        """A trial's actor says on which node and in which placement group it is."""
        self._actors[key].node, self._actors[key].group = node, group
        if self._nodes.get(actor) != node:
            self._nodes[actor] = node
            self._place(key, node)

    def row(self, key: str) -> None:
        """A trial gave a row, perhaps not its last: its node works."""
        node = self._node(key)
        if node is not None:
            self._left_out.row(node)

    def measured(self, key: str) -> None:
        """A trial's last row is in the ledger: its actor is about to be free."""
        self._rows.add(key)
        self._ending.append(key)

    def may_fail(self, key: str) -> bool:
        """Whether one more end that is to blame on a trial would leave it another try."""
        return self._failures[key] < self._limits.retries

    def failed(
        self,
        key: str,
        kind: Kind,
        *,
        step: int = 0,
        hopeless: bool = False,
        mistaken: bool = False,
    ) -> bool:
        """A trial came back without a row. Whether it will be tried again.

        Not when it has failed too often, nor if it is `hopeless` and there is no other node that
        might think better of it, nor if its program is `mistaken`, which it is anywhere. Losses
        count only while the trial gets no further: those before its newest checkpoint, at `step`,
        are forgiven.
        """
        if step > self._reached[key]:
            self._reached[key] = step
            self._losses[key] = 0
        blame = self._failures if kind in BLAMED else self._losses
        blame[key] += 1
        elsewhere = kind != "node lost" and not mistaken and self._turn_from_node(key)
        again = not (
            mistaken
            or (hopeless and not elsewhere)
            or self._stop.wanted
            or self._failures[key] > self._limits.retries
            or self._losses[key] > self._limits.restarts
        )
        self._leave(key, again=again)
        return again

    def hold_gpu(self, key: str, gpu: str, seconds: float) -> str | None:
        """Start a trial again elsewhere, while its worker keeps the GPU that ended it from others.

        Return Tune's name of the trial whose worker that is. None, and nothing has changed, where
        too many GPUs would be held, or where the trial has no try left: the first GPU costs it
        none, however often it is given that one, but every other one does.
        """
        placement = self.queue.job(key).placement
        held = sum(self.queue.job(name).placement.gpus for name in self._holds)
        if placement.nodes > 1 or held + placement.gpus > MOST_HELD * self._known.gpus:
            return None
        bad = self._bad_gpus.setdefault(key, {gpu})
        if gpu not in bad and not self.may_fail(key):
            return None
        self._failures[key] += gpu not in bad
        bad.add(gpu)
        trial_id = next(name for name, own in self._keys.items() if own == key)
        name = f"{key} {trial_id}"
        self._holds.add(name)
        self._keys[trial_id], self._actors[name] = name, self._actors.pop(key)
        self.queue.set_apart(key, name, seconds, self.clock())
        return trial_id

    @property
    def only_holds(self) -> bool:
        """Whether all that Tune still has are workers that keep a GPU, and no trial is left."""
        mine = self._keys.values()
        return bool(mine) and self._holds.issuperset(mine) and not self._unfinished

    @property
    def _unfinished(self) -> bool:
        return bool(self.queue.waiting or self.queue.running - self._rows)

    def hold_back(self, failed: Collection[str]) -> str | None:
        """Start no trial that waits, but for the smallest one if a cause of size may spare it.

        The smallest has the fewest parameters of those with the least FLOPs. It may be spared if it
        has fewer FLOPs, parameters or tokens than each of those that `failed`. Returns its key, or
        None. See `first_failures`.
        """
        sizes = {key: _size(order.trial) for key, order in self._orders.items()}
        waiting = self.queue.waiting_keys
        least = min((sizes[key].flops for key in waiting), default=0.0)
        smallest = min(
            (key for key in waiting if sizes[key].flops <= SAME_FLOPS * least),
            key=lambda key: (sizes[key].params, sizes[key].flops, key),
            default=None,
        )
        if smallest is not None:
            lowest = map(min, zip(*(sizes[key] for key in failed), strict=True))
            if not any(own < low for own, low in zip(sizes[smallest], lowest, strict=True)):
                smallest = None
        self.queue.keep_back(() if smallest is None else (smallest,))
        return smallest

    def unfit(self, key: str) -> None:
        """A trial's node cannot work on the sweep: the trial starts again, and nothing there."""
        node = self._actors[key].node
        if node is not None:
            self._left_out.unfit(node)
        self._leave(key, again=not self._stop.wanted)

    @property
    def lacks(self) -> str:
        """Why no trial may have a worker though some wait."""
        n = len(self._out)
        if self._holds and not n:
            return "GPUs that failed are held for a while, and the others have no room"
        if n:
            rest = ", and the others have no room" if self._known.nodes else ""
            return f"{n} node{'s are' if n > 1 else ' is'} left out for a while{rest}"
        if self._known.nodes:
            return "the cluster has no room for one, perhaps for other jobs' sake"
        return "the cluster has no nodes"

    def _node(self, key: str) -> str | None:
        """Where a trial is, or should be as long as it has told nothing; one node of a gang's."""
        return self._actors[key].node or self.queue.where(key)

    def _turn_from_node(self, key: str) -> bool:
        """Start a trial on other nodes than the one that just ended it; whether any could hold it.

        So a bad node costs each trial one try.
        """
        node, wide = self._node(key), self.queue.job(key).placement.nodes
        if node is None or wide > 1:  # of a gang's nodes it may have been any
            return len(self._known.nodes) > wide
        self._left_out.ended(node, key)
        return self.queue.avoid(key, node)

    def _relayed(self, now: float) -> str | None:
        """The trial that takes over the actor of one that was just measured."""
        while self._ending:
            key = self._ending.pop(0)
            follower = self.queue.relay(key, now)
            if follower is not None:
                self._leaving.pop(key, None)
                self._actors[follower] = self._actors.pop(key)
                return follower
        return None

    def _started_anew(self, trial_id: str, now: float) -> str | None:
        """The next trial, in an actor of its own."""
        self._let_go(now)
        key = self.queue.next(now)
        if key is not None:
            free = self._free_lines.setdefault(self.queue.job(key).placement, [])
            self._actors[key] = _Actor(free.pop() if free else trial_id)
        return key

    def _leave(self, key: str, *, again: bool) -> None:
        self._leaving[key] = _Leaving(self.clock(), again)

    def _let_go(self, now: float) -> None:
        """Have the room back of those whose actors have gone.

        Of all if Tune has no trial: it ends their actors only when it has another one.
        """
        if self._keys and now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        for key, leaving in list(self._leaving.items()):
            group = self._actors[key].group
            late = now - leaving.since > GIVE_UP_SECONDS
            if self._keys and group is not None and not late and not self._gone(group):
                continue
            del self._leaving[key]
            line = self._actors.pop(key).line
            self._free_lines.setdefault(self.queue.job(key).placement, []).append(line)
            if leaving.again:
                self.queue.lost(key, now)
            else:
                self._holds.discard(key)
                self.queue.ended(key, now)

    def _place(self, key: str, node: str | None) -> None:
        alone = self.queue.job(key).placement.nodes == 1
        self.queue.started(key, [node] if node and alone else [], self.clock())

    def _look(self, now: float) -> None:
        """Let the queue know of nodes that joined or left, and the cluster of what waits."""
        out = self._left_out.out
        if out == self._out and now - self._looked < LOOK_SECONDS:
            return
        self._looked, self._out = now, out
        self._grow(bool(self.queue.waiting))
        nodes = self._cluster().nodes
        found = Cluster(nodes=tuple(node for node in nodes if node.name not in out))
        if found != self._known:
            self._known = found
            self.queue.move(found)


def _size(trial: Trial) -> _Size:
    return _Size(
        flops=flops_per_token(trial.shape) * trial.tokens,
        params=params(trial.shape).total,
        tokens=trial.tokens,
    )
