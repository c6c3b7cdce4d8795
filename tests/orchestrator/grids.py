"""Ray Tune's side of a grid, without Ray: what the tests of `orchestrator.grid` share."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, cast

from ray.tune.search import Searcher

from cluster.budget import Caps
from cluster.machines import Cluster, Node
from cluster.placement import Placement
from cluster.queue import Job, Queue
from orchestrator.grid import ASK_SECONDS, Grid
from orchestrator.lease import Lease
from orchestrator.order import Order
from orchestrator.spec_running import Checkpoints, Limits
from orchestrator.stop import Stop
from tests.orchestrator.workers import simulated

CORE, GPU, TWO_GPUS = Placement(), Placement(gpus=1.0), Placement(gpus=2.0)
ORDER = Order(
    trial=simulated(),
    project="/p",
    generation=1,
    nonce="n",
    ranks=1,
    report_seconds=1.0,
    silent_seconds=None,
    checkpoints=Checkpoints(),
)


class Tune:
    """What Tune does with a grid: asks, starts, and tells of ends."""

    def __init__(
        self, jobs: list[Job], cluster: Cluster, *, caps: Caps | None = None, **limits: Any
    ) -> None:
        self.now = 0.0
        self.cluster = cluster
        self.wished: list[bool] = []
        self.idle: list[float] = []
        self.left_out: list[str] = []
        self.rows: set[str] = set()
        self.stop = Stop(cast(Lease, SimpleNamespace(lost=threading.Event())))
        self.grid = Grid(
            Queue(jobs, cluster, slots=limits.get("slots"), caps=caps),
            {job.key: replace(ORDER, nonce=job.key) for job in jobs},
            limits=Limits(**limits),
            stop=self.stop,
            cluster=lambda: self.cluster,
            clock=lambda: self.now,
            gone=lambda group: group not in self.there,
            grow=self.wished.append,
            idle=lambda: self.idle.append(self.now),
            left_out=lambda node, why: self.left_out.append(node),
        )
        self.there: set[str] = set()
        """Placement groups that still hold their room."""
        self.handed: dict[str, str] = {}
        """Tune's own name of the trial in progress of each key."""
        self._number = 0

    def ask(self) -> str | None:
        """The key that comes next; "" for never again."""
        self._number += 1
        name = f"trial {self._number}"
        config = self.grid.suggest(name)
        if config is None or config == Searcher.FINISHED:
            return config and ""
        assert Order.load(config["order"]).nonce == config["key"]
        assert config["key"] not in self.handed  # one attempt at a time
        self.handed[config["key"]] = name
        return str(config["key"])

    def ask_all(self) -> list[str]:
        """What is handed out until nothing more is, for now or for ever."""
        return list(takewhile(bool, iter(self.ask, None)))

    def end(self, key: str) -> None:
        """Its row is told, and Tune is done with it before it asks for another."""
        self.now += 2 * ASK_SECONDS
        self.rows.add(key)
        self.grid.row(key)
        self.grid.measured(key)
        self.grid.on_trial_complete(self.handed.pop(key), {})

    def fail(self, key: str, kind: Any, **more: Any) -> bool:
        self.now += 2 * ASK_SECONDS
        self.grid.on_trial_complete(self.handed.pop(key), error=True)
        return self.grid.failed(key, kind, **more)


def cores(n: int) -> list[Job]:
    """So many trials of one core, a the longest."""
    return [Job(key=chr(97 + i), placement=CORE, seconds=100.0 - i) for i in range(n)]


def cluster_of(*names: str, gpus: int = 2) -> Cluster:
    return Cluster(nodes=tuple(Node(name=name, cpus=8.0, gpus=gpus) for name in names))
