"""The Ray that a sweep runs on: one of this machine for the time being, or a running cluster.

Ray reads its environment when it is imported: call `prepare` before anything imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from analysis.errors import InputError
from cluster.machines import Cluster, cluster_from_ray, cpu_slots
from orchestrator.storage import Storage, open_storage

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints boxes even when silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets trials write their checkpoints
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # how many wait is the queue's business
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1e9",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # Tune's own state is never read again
}
"""Read by Ray when it is imported, and inherited by its workers."""
OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store; this is near its least."""
LOOPBACK = "127.0.0.1"
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is 0, all of Ray's servers listen on loopback alone, on Linux too."""
CONNECT_SECONDS = 5.0
CONNECT_RETRIES = "5"
"""Of Ray's attempts to connect, a second each; by default it goes on for over a minute."""
PROOF_SECONDS = 60.0
"""For all nodes to prove that they see the project: a new worker process takes a second or two."""
REMEDY = "put the project on storage that all nodes share, or at an s3:// or gs:// URI"
MODULES = ("analysis", "trainers", "cluster", "orchestrator")


def prepare(address: str | None) -> None:
    """Set Ray's environment, before it is imported.

    A Ray that we start asks for a token, new each time unless the user has one. A running cluster
    is spoken to as RAY_AUTH_MODE says, with the token where the environment has one.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    else:
        os.environ.setdefault("NUM_REDIS_GET_RETRIES", CONNECT_RETRIES)
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if address is None and not token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if address is None or token:
        os.environ["RAY_AUTH_MODE"] = "token"


def check(address: str) -> None:
    """Refuse an address that cannot be one of a cluster, or where nobody listens.

    Raises
    ------
    InputError
        Saying which.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise InputError(
            f"--address {address} is a Ray client's: trials would be scheduled in a process that "
            "sees other files than you. Run on a node of the cluster with --address auto, or use "
            "`isoflop submit SWEEP.toml --address http://HEAD:8265`"
        )
    host, _, port = address.rpartition(":")
    if address.startswith("http") or not host or not port.isdigit():
        raise InputError(
            f"--address {address!r} is neither `auto` nor HOST:PORT of a cluster's head (6379 "
            "unless it was started otherwise); http://HEAD:8265 is for `isoflop submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): is it running, and is this its head's "
            "address?"
        ) from error


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """The Ray at `address`; for None the one that is connected already, or one of this machine.

    Raises
    ------
    InputError
        If nothing answers at `address`, or it refuses the token.
    """
    prepare(address)
    if address is not None:
        check(address)
    import ray

    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    # Ray puts the driver's directory on its workers' path, where a user's own `cluster/` or
    # `analysis/` would stand before ours; and a local Ray stays in it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        with contextlib.chdir(empty):
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=cpu_slots(),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    **quiet,
                )
            else:
                _join(address, quiet)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        text = str(error)
        if "token" in text.lower():
            raise InputError(
                f"the Ray cluster at {address} refuses the token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's, or "
                "RAY_AUTH_MODE=disabled if it asks for none"
            ) from error
        where = "on this machine" if address == "auto" else f"at {address}"
        raise InputError(
            f"no Ray cluster answers {where}: {text.strip().splitlines()[0]}"
        ) from error


def machines() -> Cluster:
    """The nodes of the cluster that is connected, now."""
    return cluster_from_ray(_nodes())


def _nodes() -> list[dict[str, Any]]:
    import ray

    # Ray leaves this call untyped.
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def prove(storage: Storage, token: str, generation: int) -> None:
    """Have every node show that it sees the same project, through the same isoflop.

    Each reads the token that lies in the project and writes an answer beside it.

    Raises
    ------
    InputError
        Naming a node that does not, or does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in _nodes() if n["Alive"] and n["NodeID"] != here and _trains(n)]
    if not others:
        return
    ask = ray.remote(num_cpus=0, max_retries=0)(answer)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote(storage.uri, token, generation, n["NodeID"]): n
        for n in others
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PROOF_SECONDS)
    for reference in [*late, *done]:
        node = f"node {asked[reference]['NodeManagerAddress']}"
        if reference in late:
            raise InputError(f"{node} has not answered for {PROOF_SECONDS:.0f} s: is it reachable?")
        try:
            sources = ray.get(reference)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            raise InputError(f"{node} cannot work on {storage.uri}: {_last_line(cause)}") from error
        if sources != fingerprint():
            raise InputError(
                f"{node} has another isoflop than this machine: install the same on all nodes, or "
                "use `isoflop submit`, which ships it"
            )
        try:
            seen = storage.read(_answer_name(generation, asked[reference]["NodeID"])).decode()
        except FileNotFoundError:
            seen = ""
        if seen != token:
            raise InputError(f"{node} does not see the same {storage.uri} as the driver: {REMEDY}")
    for other in others:
        storage.remove(_answer_name(generation, other["NodeID"]))


def answer(project: str, token: str, generation: int, node: str) -> str:
    """On a node: check the token, answer beside it, and say what isoflop this is."""
    storage = open_storage(project)
    witness(storage, token, generation)
    storage.replace(_answer_name(generation, node), token.encode())
    return fingerprint()


def witness(storage: Storage, token: str, generation: int) -> None:
    """Check that this process sees the project that holds `token`.

    Raises
    ------
    InputError
        If it does not.
    """
    try:
        seen = storage.read(token_name(generation)).decode()
    except FileNotFoundError:
        seen = ""
    if seen != token:
        raise InputError(
            f"{socket.gethostname()} does not see the same {storage.uri} as the driver: {REMEDY}"
        )


def token_name(generation: int) -> str:
    """Where a driver leaves the token that its workers look for."""
    return f"leases/{generation}.token"


def _answer_name(generation: int, node: str) -> str:
    return f"leases/{generation}.{node}.token"


def _trains(node: dict[str, Any]) -> bool:
    """Whether trials may run on a node: heads of clusters are often started without resources."""
    return any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))


@cache
def fingerprint() -> str:
    """Hash of the sources of isoflop as this process has them."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for module in MODULES:
        for path in sorted((root / module).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
