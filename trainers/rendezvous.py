"""How the ranks of a gang find each other: within minutes, or with an error that names addresses.

Reads the environment of `torch.distributed`, as `cluster.gang` sets it. Training then waits for the
others as long as it takes; what it does with them is in `trainers.ranks`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from analysis.errors import first_line
from trainers.template import RANK_ADDRESSES

RENDEZVOUS_SECONDS = 600.0
"""Longest time that a rank waits to meet the others. Their processes run already, and need only
import torch and connect: what takes longer is a network on which they do not reach each other."""
ADVICE = (
    "the nodes of a gang must reach each other at these addresses on every port, and "
    "GLOO_SOCKET_IFNAME, where it is set, must name the interface that has them"
)
BACKLOG = 2048
"""Connections that may wait to be accepted: all ranks come at once."""


class RendezvousError(Exception):
    """The ranks of a gang did not find each other."""


@dataclass(frozen=True)
class _Place:
    """Which rank this is, and where all of them are."""

    rank: int
    count: int
    master: str
    port: int
    addresses: Sequence[str]
    deadline: float = field(default_factory=lambda: time.monotonic() + RENDEZVOUS_SECONDS)

    @property
    def left(self) -> timedelta:
        return timedelta(seconds=max(0.01, self.deadline - time.monotonic()))

    def name(self, rank: int) -> str:
        address = f"{self.master}:{self.port}" if rank == 0 else self.address(rank)
        return f"rank {rank} at {address}" if address else f"rank {rank}"

    def address(self, rank: int) -> str:
        return self.addresses[rank] if rank < len(self.addresses) else ""

    def error(self, what: str, reason: Exception) -> RendezvousError:
        limit = f"which may take {RENDEZVOUS_SECONDS:g} s"
        why = f"{limit} ({first_line(reason)})"
        return RendezvousError(f"{self.name(self.rank)} {what}, {why}: {ADVICE}")


def meet() -> Store:
    """Meet all other ranks, and return the store in which they leave each other messages.

    The first rank listens at MASTER_ADDR alone, not on all interfaces as torch does by itself,
    since the store asks nobody who they are. Every rank then connects to every other over the
    network that training uses, and adds up a number with them.

    Raises
    ------
    RendezvousError
        If they do not all meet within `RENDEZVOUS_SECONDS`, with the addresses that were tried.
    """
    names = os.environ
    place = _Place(
        rank=int(names["RANK"]),
        count=int(names["WORLD_SIZE"]),
        master=names["MASTER_ADDR"],
        port=int(names["MASTER_PORT"]),
        addresses=names.get(RANK_ADDRESSES, "").split(),
    )
    store = _store(place)
    _gather(store, place)
    _connect(store, place)
    return store


def _store(place: _Place) -> Store:
    """Serve the store on the first rank, and connect to it on the others."""
    first = place.rank == 0
    try:
        listening = _listen(place.master, place.port) if first else None
    except OSError as error:
        raise RendezvousError(
            f"rank 0 of {place.count} cannot listen at {place.master}:{place.port} ({error}): "
            "another attempt chooses another port"
        ) from error
    try:
        return TCPStore(
            place.master,
            place.port,
            place.count,
            is_master=first,
            timeout=place.left,
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except RuntimeError as error:  # torch's own errors are no more specific by contract
        raise place.error(f"did not reach {place.name(0)}", error) from error


def _listen(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # The rank's process has reserved the port by a socket that is bound and does not listen.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _gather(store: Store, place: _Place, what: str = "here") -> None:
    """Wait until every rank has come so far."""
    keys = [f"{what}/{rank}" for rank in range(place.count)]
    try:
        store.set(keys[place.rank], "1")
        store.wait(keys, place.left)
    except RuntimeError as error:
        try:
            late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:  # the first rank has gone, and the store with it
            late = [0]
        ranks = ", ".join(map(place.name, late)) or "the others"
        raise place.error(f"was not joined by {ranks}", error) from error


def _connect(store: Store, place: _Place) -> None:
    """Prove the connections of every rank to every other, in a group that is given up again."""
    try:
        dist.init_process_group(
            "gloo",
            store=PrefixStore("meeting", store),
            rank=place.rank,
            world_size=place.count,
            timeout=place.left,
        )
        dist.all_reduce(torch.ones(()))
    except RuntimeError as error:
        others = ", ".join(place.name(rank) for rank in range(place.count) if rank != place.rank)
        raise place.error(f"could not exchange data with {others}", error) from error
    # Gloo fails in a rank that still listens to one that has left.
    _gather(store, place, "met")
    dist.destroy_process_group()
