"""The Ray that a sweep runs on: one of this machine for the time being, or a running cluster.

Ray reads its environment when it is imported: call `prepare` before anything imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from analysis.errors import InputError, first_line
from cluster.machines import Cluster, cluster_from_ray, cpu_slots
from orchestrator.gpu_reports import GpuReports
from orchestrator.scratch import scratch, who_can_rename_in

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
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, in bytes: sizeof(sun_path) less its zero byte."""
LONGEST_SOCKET = "session_2026-11-30_23-59-59_999999_4194304/sockets/plasma_store"
"""Longest path of a socket below Ray's directory, with the largest process id."""
PREFIX = "isoflop-r-"
"""Prefix of the directory of a Ray of this machine; short, for the paths of its sockets."""
DIRECTORY_REMEDY = "set RAY_TMPDIR to a short path, of a directory of yours (mkdir -m 700 DIR)"
"""What to do where no directory for temporary files does for Ray."""
RAYLET = "raylet"
"""Name of the program that runs on each node of a Ray cluster."""
CONNECT_SECONDS = 5.0
CONNECT_RETRIES = "5"
"""Of Ray's attempts to connect, a second each where it is refused; by default there are 20."""
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
"""The first words of an HTTP/2 client; a server's first is its settings (RFC 9113, section 3.4)."""


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
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", CONNECT_RETRIES)
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if address is None and not token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if address is None or token:
        os.environ["RAY_AUTH_MODE"] = "token"


def check(address: str) -> str:
    """Refuse an address that cannot be one of a cluster, or where nobody listens.

    Returns HOST:PORT of the cluster's head. `auto` is what RAY_ADDRESS says, or the cluster that
    this user runs a node of on this machine.

    Raises
    ------
    InputError
        Saying which.
    """
    if address == "auto":  # Ray's own name for a job's cluster is what it will look at
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        address = _own_cluster()
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
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as found:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                _greet(found)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): is it running, and is this its head's "
            "address?"
        ) from error
    return address


def _own_cluster() -> str:
    """Return the address of the head of the cluster whose raylet this user runs here.

    Ray would believe any process whose command line begins with `raylet`, and send it the token.

    Raises
    ------
    InputError
        If there is none, or more than one.
    """
    addresses = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.uids().real != os.geteuid() or Path(process.exe()).name != RAYLET:
                continue
            options = dict(word.partition("=")[::2] for word in process.cmdline())
            temporary = f"/{PREFIX}" in options.get("--session_dir", "")  # of another `isoflop run`
            if not temporary and (head := options.get("--gcs-address")):
                addresses.add(head)
    if len(addresses) == 1:
        return addresses.pop()
    if addresses:
        raise InputError(
            f"you run nodes of several Ray clusters on this machine, whose heads are at "
            f"{' and '.join(sorted(addresses))}: name one with --address HOST:PORT"
        )
    raise InputError(
        "you run no node of a Ray cluster on this machine, and RAY_ADDRESS is not set: start one "
        "with `ray start`, or give --address HOST:PORT of a cluster's head (other users' Rays are "
        "not looked at)"
    )


def _greet(found: socket.socket) -> None:
    """Make sure that what listens speaks HTTP/2, as Ray does: Ray itself would wait for minutes."""
    found.sendall(GREETING)
    kind = found.recv(len(SETTINGS))[3:4]  # of the first frame: RFC 9113, section 4.1
    if kind != SETTINGS[3:4]:
        raise ConnectionError("what listens there is no Ray head")


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
        address = check(address)
    import ray

    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    # Ray puts the driver's directory on its workers' path, where a user's own `cluster/` or
    # `analysis/` would stand before ours; and a local Ray stays in it.
    with contextlib.ExitStack() as directories:
        empty = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with contextlib.chdir(directories.enter_context(empty)):
            if address is None:
                private = directories.enter_context(private_directory())
                ray.init(
                    _temp_dir=str(private),
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


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for Ray's session that no other user can reach, gone with the block.

    Ray lets everybody write into the directory that it is given, where others could put their code
    in the place of a job's, or links in that of logs. So it gets one within a private one.

    Raises
    ------
    InputError
        If the path in RAY_TMPDIR is too long or not safe, or no directory can be written to.
    """
    chosen = os.environ.get("RAY_TMPDIR")
    reasons = []
    for place in [Path(chosen)] if chosen else dict.fromkeys(_temporary_directories()):
        if reason := _unfit(place):
            reasons.append(reason)
            continue
        with scratch(place, PREFIX) as directory:
            yield _session_parent(directory)
        return
    which = "the directory in RAY_TMPDIR does not do" if chosen else "no directory does"
    raise InputError(f"{which} for Ray's sockets: {'; '.join(reasons)}: {DIRECTORY_REMEDY}")


def _session_parent(private: Path) -> Path:
    return private / "r"


def _unfit(place: Path) -> str | None:
    """Return why Ray's directory cannot be made in another one; None if it can."""
    if not place.is_absolute():  # Ray takes it for one in the directory of each of its processes
        return f"{place} is no absolute path"
    if not _holds_sockets(_session_parent(place / f"{PREFIX}12345678")):
        return f"{place} is too long: sockets' paths have at most {SOCKET_PATH_BYTES} bytes"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} is not there, or you may not write in it"
    return who_can_rename_in(place)


def _temporary_directories() -> Iterator[Path]:
    """Yield the directories in which Ray's may be made, the usual place first."""
    if place := os.environ.get("TMPDIR"):
        yield Path(place)
    yield Path("/tmp")
    yield Path("/var/tmp")
    if place := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(place)
    yield Path.home()


def _holds_sockets(directory: Path) -> bool:
    return len(os.fsencode(directory / LONGEST_SOCKET)) <= SOCKET_PATH_BYTES


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, **quiet)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        refused = "AuthToken" in f"{error} {error.__cause__}"
        if refused or isinstance(error, AuthenticationError):
            what = "refuses the token" if refused else "is to be shown a token, and there is none"
            raise InputError(
                f"the Ray cluster at {address} {what}: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's, or "
                "RAY_AUTH_MODE=disabled if it asks for none"
            ) from error
        raise InputError(f"no Ray cluster answers at {address}: {first_line(error)}") from error


def machines(reports: GpuReports, *, wait: float = 0.0) -> Cluster:
    """The nodes of the cluster that is connected, now; new ones are asked for their GPUs.

    Their answers are waited for so long at most.
    """
    there = nodes()
    return cluster_from_ray(there, reports.update(there, wait=wait))


def address_of(node: str) -> str:
    """A node's address, by its id; the id where Ray no longer knows it."""
    known = {item["NodeID"]: item["NodeManagerAddress"] for item in nodes()}
    return f"node {known.get(node, node)}"


def group_gone(group: str) -> bool:
    """Whether a placement group, by its id, has given its room back."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table

    found = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group)))
    return bool(placement_group_table(found).get("state", "REMOVED") == "REMOVED")


def nodes() -> list[dict[str, Any]]:
    """What Ray says of every node that there is or was."""
    import ray

    # Ray leaves functions like this one without types.
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found
