"""Every node proves that it works on the same project, through the same isoflop.

The driver leaves a nonce, a random word, in the project. A node that reads it there and writes it
beside sees the same storage; a node whose sources have another hash is another isoflop.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from analysis.errors import InputError, last_line
from cluster.nvidia import SMI_SECONDS
from orchestrator.connection import nodes
from orchestrator.gpu_checks import (
    PROBE_SECONDS,
    Use,
    gpu_checks,
    gpus_work,
    is_of_gpus,
)
from orchestrator.storage import Storage, open_storage

PROOF_SECONDS = 300.0
"""Time limit for the answers of all nodes. A new worker process takes a second or two, but minutes
where Python and its packages come from a network file system that has nothing in its cache."""
GPU_PROOF_SECONDS = PROBE_SECONDS + SMI_SECONDS + PROOF_SECONDS
"""Time limit for all nodes to try their GPUs, each in a process with a limit of its own."""
REMEDY = "put the project on storage that all nodes share, or at an s3:// or gs:// URI"
ON_CORES = "; or train on cores: CUDA_VISIBLE_DEVICES= isoflop run ..."
"""What also helps with a Ray that isoflop starts: it offers the GPUs that this variable names."""
Node = dict[str, Any]
"""A node as `ray.nodes()` describes it."""
ROOMS = ("analysis", "trainers", "cluster", "orchestrator")
"""The packages that isoflop is."""


def prove_nodes(storage: Storage, nonce: str, generation: int) -> None:
    """Have every node show that it sees the same project, through the same isoflop.

    Each reads the nonce that lies in the project and writes an answer beside it.

    Raises
    ------
    InputError
        Naming a node that does not, or does not answer.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in nodes() if n["Alive"] and n["NodeID"] != here and _trains(n)]
    try:
        answers = ask_nodes(
            others,
            answer,
            lambda node: (storage.uri, nonce, generation, node["NodeID"]),
            PROOF_SECONDS,
        )
        for node, sources in answers:
            try:
                _require_same(storage, sources, node, nonce, generation)
            except InputError:
                if _lives(node):
                    raise
    finally:
        for other in others:
            storage.remove(_answer_name(generation, other["NodeID"]))


def ask_nodes(
    there: Iterable[Node],
    function: Callable[..., Any],
    arguments: Callable[[Node], tuple[Any, ...]],
    seconds: float,
) -> list[tuple[Node, Any]]:
    """Have each node run a function, as a task that takes nothing of it, and return the results.

    Parameters
    ----------
    there
        Nodes, as Ray describes them.
    function
        What they run; it is pickled.
    arguments
        Returns what a node is given.
    seconds
        Time limit for all of them together.

    Returns
    -------
    Each node with its result, with the exception that it raised, or with a `TimeoutError`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments(node)): node
        for node in there
    }
    if not asked:  # Ray refuses to wait for nothing
        return []
    _, late = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    for reference in late:
        ray.cancel(reference, force=True)
    silent = TimeoutError(f"has not answered for {seconds:.0f} s: is it reachable?")
    return [
        (node, silent if reference in late else _result(reference))
        for reference, node in asked.items()
    ]


def _result(reference: Any) -> Any:
    """Return what a task returned, or what it raised, without Ray's wrapping."""
    import ray

    try:
        return ray.get(reference)
    except Exception as error:  # the caller judges it
        return getattr(error, "cause", None) or error


def _require_same(storage: Storage, sources: Any, node: Node, nonce: str, generation: int) -> None:
    """Refuse a node whose answer, its `sources`, is not that of one like this."""
    if isinstance(sources, TimeoutError):
        raise InputError(f"{called(node)} {sources}")
    if isinstance(sources, Exception):
        raise InputError(
            f"{called(node)} cannot work on {storage.uri}: {last_line(sources)}"
        ) from sources
    if sources != fingerprint():
        raise InputError(
            f"{called(node)} has another isoflop than this machine: install the same on all "
            "nodes, or use `isoflop submit`, which ships it"
        )
    name = _answer_name(generation, node["NodeID"])
    if storage.read_many([name]).get(name) != nonce.encode():
        raise InputError(
            f"{called(node)} does not see the same {storage.uri} as the driver: {REMEDY}"
        )


def prove_gpus(use: Use, *, own: bool = False) -> list[str]:
    """Have every node that offers GPUs to Ray try them; return lines for a person.

    Where some nodes' GPUs work, the others' are no more than a line: their workers find out by
    themselves, and the nodes are left out.

    Parameters
    ----------
    use
        What trials need of them.
    own
        Whether isoflop started this Ray, on this machine.

    Raises
    ------
    InputError
        If no node's GPUs work, with the versions of driver, CUDA and torch.
    """
    there = [node for node in nodes() if node["Alive"] and offered(node)]
    answers = ask_nodes(there, gpu_checks, lambda node: (use, offered(node)), GPU_PROOF_SECONDS)
    works: Counter[str] = Counter()
    troubles, unusable = [], []
    for node, checks in answers:
        if isinstance(checks, Exception):
            if _lives(node):
                unusable.append(f"{called(node)}: {last_line(checks)}")
            continue
        lines = [f"{called(node)}: {c.value}: {c.remedy}" for c in checks if c.status != "ok"]
        if not gpus_work(checks):
            unusable += lines
            continue
        fit = [check.value for check in checks if is_of_gpus(check) and check.status == "ok"]
        works["; ".join(fit)] += 1
        troubles += lines
    if unusable and not works:
        count = f"none of {len(answers)} nodes has a GPU that works; " if len(answers) > 1 else ""
        raise InputError(f"{count}{unusable[0]}{ON_CORES if own and use == 'torch' else ''}")
    lines = [f"GPUs of {n} node{'s' * (n > 1)}: {text}" for text, n in works.items()]
    return lines + troubles + unusable


def offered(node: Node) -> int:
    """Return the number of GPUs that a node offers to Ray."""
    return int(node["Resources"].get("GPU", 0))


def _lives(node: Node) -> bool:
    """Whether a node is still there: one that left meanwhile is no reason to refuse the others."""
    return any(n["Alive"] for n in nodes() if n["NodeID"] == node["NodeID"])


def called(node: Node) -> str:
    """Return what a person calls a node."""
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


def _trains(node: Node) -> bool:
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
