"""Free room on a cluster's nodes: where a placement fits now, and when it is expected to.

GPUs are kept in eighths, since a share must lie within one GPU. Arrays, not objects: the forecast
of a makespan asks thousands of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.machines import Cluster
from cluster.placement import Placement

EIGHTHS = 8
FREE = -math.inf
SOON = 1e-6
"""Seconds from now at which whatever is late is expected to end, at every moment again."""

Mask = NDArray[np.bool_]
Names = frozenset[str]
NONE: Names = frozenset()


@dataclass(frozen=True)
class Spot:
    """Where a placement fits: nodes, and on each the same number of GPUs."""

    nodes: tuple[int, ...]
    gpus: tuple[tuple[int, ...], ...]
    """Of each node."""


class Held(NamedTuple):
    """Room that is taken."""

    placement: Placement
    spot: Spot
    end: float
    """When it is expected to be free."""


@dataclass(frozen=True)
class Reservation:
    """Room kept for a placement that does not fit yet."""

    time: float
    """When all of it is expected to be free."""
    gpus: Mask
    """Shape (nodes, GPUs): those kept."""
    rest: NDArray[np.float64]
    """Shape (nodes, 2): cores and bytes of memory kept."""


class Room:
    """What is free on each node, and until when the rest is expected to be taken."""

    def __init__(self, cluster: Cluster) -> None:
        self.names = [node.name for node in cluster.nodes]
        most = max((node.gpus for node in cluster.nodes), default=0)
        counts = np.array([node.gpus for node in cluster.nodes], dtype=np.int64)
        here = np.arange(most) < counts[:, None]
        self._free = np.where(here, EIGHTHS, 0)
        self._ends = np.where(here[:, :, None], FREE, np.inf).repeat(EIGHTHS, axis=2)
        rest = [(float(node.cpus), node.memory_bytes) for node in cluster.nodes]
        self._rest = np.array(rest, dtype=np.float64).reshape(-1, 2)  # cores and bytes
        self._all = self._rest.copy()
        self._types = np.array([str(node.gpu_type) for node in cluster.nodes])
        self._gpus = counts
        self._whole = counts.copy()  # GPUs of each node that are wholly free
        self._suited: dict[Placement, Mask] = {}
        self._held: dict[str, Held] = {}

    def find(
        self, placement: Placement, kept: Reservation | None = None, *, but: Names = NONE
    ) -> Spot | None:
        """Where `placement` fits now, without what is `kept`, and on no node of `but`.

        The fullest place that holds it, so that whole GPUs and whole nodes stay whole.
        """
        if placement.gpus >= 1 and self._whole.max(initial=0) < placement.gpus_per_node:
            return None
        rest = self._rest if kept is None else self._rest - kept.rest
        able = self._able(placement, but) & (rest >= _needs(placement)).all(1)
        if not placement.gpus:
            # Cores of nodes without GPUs first.
            return _single(np.where(able, self._rest[:, 0] + 1e6 * (self._gpus > 0), np.inf))
        if placement.gpus < 1:
            return self._find_share(_eighths(placement), able, kept)
        free, whole = self._free, self._whole
        if kept is not None:
            free = free * ~kept.gpus
            whole = (free == EIGHTHS).sum(1)
        each = int(placement.gpus_per_node)
        score = np.where(able & (whole >= each), whole, np.inf)
        if placement.nodes == 1:
            best = [int(score.argmin())]
        else:
            best = [int(node) for node in score.argsort(kind="stable")[: placement.nodes]]
        if len(best) < placement.nodes or score[best[-1]] == np.inf:
            return None
        gpus = [tuple(map(int, (free[n] == EIGHTHS).nonzero()[0][:each])) for n in best]
        return Spot(tuple(best), tuple(gpus))

    def _find_share(self, size: int, able: Mask, kept: Reservation | None) -> Spot | None:
        """The fullest GPU with so many eighths free, on the node with the fewest whole ones."""
        fits = (self._free >= size) & able[:, None]
        if kept is not None:
            fits &= ~kept.gpus
        score = np.where(fits, self._free * 1000 + self._whole[:, None], np.inf)
        if not score.size:
            return None
        node, gpu = divmod(int(score.argmin()), score.shape[1])
        return Spot((node,), ((gpu,),)) if fits[node, gpu] else None

    def take(self, key: str, placement: Placement, spot: Spot, end: float) -> None:
        """Take that room until about `end`."""
        size = _eighths(placement)
        for node, gpus in zip(spot.nodes, spot.gpus, strict=True):
            self._rest[node] -= _needs(placement)
            for gpu in gpus:
                self._free[node, gpu] -= size
                slots = self._ends[node, gpu]
                slots[np.flatnonzero(slots == FREE)[:size]] = end
            self._whole[node] = (self._free[node] == EIGHTHS).sum()
        self._held[key] = Held(placement, spot, end)

    def release(self, key: str) -> Held | None:
        """Give back what `key` holds, and return it; None if nothing."""
        if key not in self._held:
            return None
        held = self._held.pop(key)
        placement, spot, end = held
        size = _eighths(placement)
        for node, gpus in zip(spot.nodes, spot.gpus, strict=True):
            self._rest[node] += _needs(placement)
            for gpu in gpus:
                self._free[node, gpu] += size
                slots = self._ends[node, gpu]
                slots[np.flatnonzero(slots == end)[:size]] = FREE
            self._whole[node] = (self._free[node] == EIGHTHS).sum()
        return held

    def named(self, spot: Spot) -> Names:
        """The names of its nodes."""
        return frozenset(self.names[node] for node in spot.nodes)

    def where(self, key: str) -> str | None:
        """The first node that `key` takes room of, if any."""
        return self.names[self._held[key].spot.nodes[0]] if key in self._held else None

    def on(self, names: Names, placement: Placement) -> Spot | None:
        """The spot for `placement` on exactly these nodes, if there is room."""
        return self.find(placement, but=frozenset(self.names) - names)

    def is_beside(self, spot: Spot, placement: Placement, kept: Reservation) -> bool:
        """Whether `placement` on a free `spot` leaves what is `kept`."""
        left, needed = self._rest - kept.rest, _needs(placement)
        return all(
            (left[node] >= needed).all() and not kept.gpus[node, list(gpus)].any()
            for node, gpus in zip(spot.nodes, spot.gpus, strict=True)
        )

    def reserve(self, placement: Placement, now: float, *, but: Names = NONE) -> Reservation | None:
        """The earliest room for `placement`, by when what runs should end; None if never.

        On no node of `but`.
        """
        ends = np.where(self._ends == FREE, FREE, np.maximum(self._ends, now + SOON))
        each = max(1, int(placement.gpus_per_node))
        needed = _needs(placement)
        ready = np.full(len(self._rest), FREE)
        for node in np.flatnonzero((self._rest < needed).any(1)):
            ready[node] = self._rest_at(int(node), needed, now)
        if placement.gpus:
            size = min(EIGHTHS, _eighths(placement))
            by_gpu = np.partition(ends, size - 1, axis=2)[:, :, size - 1]
            if by_gpu.shape[1] < each:
                return None
            ready = np.maximum(ready, np.partition(by_gpu, each - 1, axis=1)[:, each - 1])
        ready = np.where(self._able(placement, but), ready, np.inf)
        nodes = np.argsort(ready, kind="stable")[: placement.nodes]
        if len(nodes) < placement.nodes or not np.isfinite(np.maximum(ready[nodes], now)).all():
            return None
        gpus = np.zeros(self._free.shape, dtype=np.bool_)
        rest = np.zeros(self._rest.shape)
        for node in nodes:
            rest[node] = needed
            if placement.gpus:
                gpus[node, np.argsort(by_gpu[node], kind="stable")[:each]] = True
        return Reservation(float(max(now, ready[nodes].max())), gpus, rest)

    def could_hold(self, placement: Placement, *, but: Names = NONE) -> bool:
        """Whether there are nodes but those on which it would fit, if nothing else ran."""
        enough = self._able(placement, but) & (self._all >= _needs(placement)).all(1)
        return int(enough.sum()) >= placement.nodes

    def _able(self, placement: Placement, but: Names) -> Mask:
        """Nodes but those with the GPUs, free or not, that `placement` needs of each."""
        if placement not in self._suited:
            able: Mask = self._gpus >= math.ceil(placement.gpus_per_node)
            if placement.gpu_type:
                able = able & (self._types == placement.gpu_type)
            self._suited[placement] = able
        able = self._suited[placement]
        if not but:
            return able
        return able & np.array([name not in but for name in self.names], dtype=np.bool_)

    def _rest_at(self, node: int, needed: NDArray[np.float64], now: float) -> float:
        """When so many cores and so much memory of a node will be free."""
        free = self._rest[node].copy()
        held = [(end, p) for p, spot, end in self._held.values() if node in spot.nodes]
        for end, placement in sorted(held, key=lambda item: item[0]):
            free += _needs(placement)
            if (free >= needed).all():
                return max(end, now + SOON)
        return math.inf


def _single(score: NDArray[np.float64]) -> Spot | None:
    """The node of the least score, if that is finite."""
    if not score.size or not np.isfinite(score.min()):
        return None
    return Spot((int(score.argmin()),), ((),))


@cache
def _needs(placement: Placement) -> NDArray[np.float64]:
    """Cores and bytes of memory that a placement takes of each of its nodes."""
    return np.array([placement.cpus, placement.memory_bytes]) / placement.nodes


def _eighths(placement: Placement) -> int:
    """What a placement takes of each of its GPUs."""
    return round(min(1.0, placement.gpus) * EIGHTHS)
