"""Every node proves that it works on the same project, through the same isoflop.

The driver leaves a nonce, a random word, in the project. A node that reads it there and writes it
beside sees the same storage; a node whose sources have another hash is another isoflop.
"""

from __future__ import annotations

import hashlib
import socket
from functools import cache
from pathlib import Path
from typing import Any

from analysis.errors import InputError, last_line
from orchestrator.connection import nodes
from orchestrator.storage import Storage, open_storage

PROOF_SECONDS = 300.0
"""For all nodes to answer. A new worker process takes a second or two, but minutes where Python and
its packages come from a network file system that has nothing in its cache."""
REMEDY = "put the project on storage that all nodes share, or at an s3:// or gs:// URI"
ROOMS = ("analysis", "trainers", "cluster", "orchestrator")
"""The packages that isoflop is."""


class UnfitNodeError(Exception):
    """A node cannot work on the sweep: it sees another project, or has another isoflop."""


def prove_nodes(storage: Storage, nonce: str, generation: int) -> None:
    """Have every node show that it sees the same project, through the same isoflop.

    Each reads the nonce that lies in the project and writes an answer beside it.

    Raises
    ------
    InputError
        Naming a node that does not, or does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in nodes() if n["Alive"] and n["NodeID"] != here and _trains(n)]
    if not others:
        return
    ask = ray.remote(num_cpus=0, max_retries=0)(answer)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote(storage.uri, nonce, generation, n["NodeID"]): n
        for n in others
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PROOF_SECONDS)
    try:
        for reference in [*late, *done]:
            try:
                if reference in late:
                    raise InputError(
                        f"{_called(asked[reference])} has not answered for {PROOF_SECONDS:.0f} s: "
                        "is it reachable?"
                    )
                _require_same(storage, reference, asked[reference], nonce, generation)
            except InputError:
                if _lives(asked[reference]):
                    raise
    finally:
        for other in others:
            storage.remove(_answer_name(generation, other["NodeID"]))


def _require_same(
    storage: Storage, reference: Any, node: dict[str, Any], nonce: str, generation: int
) -> None:
    """Refuse a node whose answer, the `reference`, is not that of one like this."""
    import ray

    try:
        sources = ray.get(reference)
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        raise InputError(
            f"{_called(node)} cannot work on {storage.uri}: {last_line(cause)}"
        ) from error
    if sources != fingerprint():
        raise InputError(
            f"{_called(node)} has another isoflop than this machine: install the same on all "
            "nodes, or use `isoflop submit`, which ships it"
        )
    name = _answer_name(generation, node["NodeID"])
    if storage.read_many([name]).get(name) != nonce.encode():
        raise InputError(
            f"{_called(node)} does not see the same {storage.uri} as the driver: {REMEDY}"
        )


def _lives(node: dict[str, Any]) -> bool:
    """Whether a node is still there: one that left meanwhile is no reason to refuse the others."""
    return any(n["Alive"] for n in nodes() if n["NodeID"] == node["NodeID"])


def _called(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']}"


def answer(project: str, nonce: str, generation: int, node: str) -> str:
    """On a node: check the nonce, answer beside it, and say what isoflop this is."""
    storage = open_storage(project)
    witness(storage, nonce, generation)
    storage.replace(_answer_name(generation, node), nonce.encode())
    return fingerprint()


def witness(storage: Storage, nonce: str, generation: int) -> None:
    """Check that this process sees the project that holds `nonce`.

    Raises
    ------
    InputError
        If it does not.
    """
    try:
        seen = storage.read(nonce_name(generation)).decode()
    except FileNotFoundError:
        seen = ""
    if seen != nonce:
        raise InputError(
            f"{socket.gethostname()} does not see the same {storage.uri} as the driver: {REMEDY}"
        )


def nonce_name(generation: int) -> str:
    """Where a driver leaves the nonce that its workers look for."""
    return f"leases/{generation}.nonce"


def forget_drivers_before(storage: Storage, generation: int) -> None:
    """Remove the nonces that killed drivers have left, and their nodes' answers."""
    directory, _, suffix = nonce_name(0).partition("0")
    for name in storage.names(directory.rstrip("/")):
        of = name.partition(".")[0]
        if name.endswith(suffix) and of.isdecimal() and int(of) < generation:
            storage.remove(directory + name)


def _answer_name(generation: int, node: str) -> str:
    return f"leases/{generation}.{node}.nonce"


def _trains(node: dict[str, Any]) -> bool:
    """Whether trials may run on a node: heads of clusters are often started without resources."""
    return any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))


def rooms() -> tuple[Path, ...]:
    """Directories of isoflop's packages, as this process has them."""
    return tuple(Path(__file__).parents[1] / room for room in ROOMS)


@cache
def fingerprint() -> str:
    """Hash of the sources of isoflop as this process has them."""
    digest = hashlib.sha256()
    for room in rooms():
        for path in sorted(room.rglob("*.py")):
            digest.update(path.relative_to(room.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
