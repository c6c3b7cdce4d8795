"""Clusters that grow: which machines an autoscaler will add, and the wish for them.

Trials are handed to Ray only where there is room for them, so Ray's autoscaler, which looks at what
waits, would never hear of the others. It is told which machines the sweep file names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.gpus import ray_name
from cluster.machines import Cluster, Node

PATIENCE_SECONDS = 2.0
"""For the wish to be taken back by a driver that ends at once."""


def announced(found: Cluster, named: Cluster) -> Cluster:
    """The machines `found`, and those of `named` that none of them is.

    A head without GPUs is none of the machines with GPUs that a sweep file names.
    """
    there = list(found.nodes)
    coming = []
    for node in named.nodes:
        same = next((other for other in there if _is_one(other, node)), None)
        if same is None:
            coming.append(node)
        else:
            there.remove(same)
    return Cluster(nodes=(*found.nodes, *coming))


def _is_one(found: Node, named: Node) -> bool:
    if not named.gpus:
        return found.cpus >= named.cpus
    same = named.gpu_type is None or ray_name(named.gpu) == ray_name(found.gpu)
    return found.gpus >= named.gpus and same


class Wish:
    """What Ray's autoscaler is asked for: the machines of `named`, as long as trials wait.

    Ray keeps one wish a cluster, the last one, until another replaces it; so it is taken back.
    """

    def __init__(self, named: Cluster | None) -> None:
        self._bundles = [_bundle(node) for node in named.nodes] if named else []
        self._told: bool | None = None

    def want(self, wanted: bool) -> None:
        """Ask for the machines, or for none any more."""
        if self._bundles and wanted != self._told:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=self._bundles if wanted else [])
            self._told = wanted

    def forget(self) -> None:
        """Take it back within a moment or not at all, from whatever state the driver is in."""
        if self._told:
            thread = threading.Thread(target=self.want, args=[False], daemon=True)
            thread.start()
            thread.join(PATIENCE_SECONDS)


def _bundle(node: Node) -> dict[str, float]:
    """What to ask for, so that one such node comes: a core a GPU, which any machine has."""
    if not node.gpus:
        return {"CPU": node.cpus}
    return {"CPU": float(node.gpus), "GPU": float(node.gpus)}


@contextmanager
def wish(named: Cluster | None) -> Iterator[Wish]:
    """A wish that ends with the block; for None, of nothing."""
    made = Wish(named)
    made.want(True)
    try:
        yield made
    finally:
        made.forget()
