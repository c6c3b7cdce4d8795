"""What on a machine would stop a sweep: one function a question, each with a typed answer.

None takes more than a few seconds, and none changes anything that it does not undo. GPUs are in
`gpu_checks`; `doctor` asks all of them, here and on the nodes of a cluster.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from analysis.errors import InputError
from cluster.dashboard import loose_token_file, token_file
from cluster.machines import WORKER_BYTES
from orchestrator.connection import DIRECTORY_REMEDY, private_directory
from orchestrator.project import require_no_way_out
from orchestrator.storage import NO_WAY_OUT, Outside, Storage, prove, reason_of

if TYPE_CHECKING:
    from orchestrator.tracking import Store

DISK_BYTES, LEAST_DISK_BYTES = 10e9, 1e9
"""Free space below which a person is warned, and below which a sweep is not worth starting: Ray's
logs, one trial's checkpoints and a small corpus (own allowance)."""
SKEW_SECONDS = 10.0
"""Difference of two clocks from which times in the ledger and in MLflow mislead."""
REFUSED_SKEW_SECONDS = 900.0
"""Difference at which S3 refuses every request: RequestTimeTooSkewed, 15 minutes."""
MLFLOW_SECONDS = 5.0
"""Time limit of each request to an MLflow server."""

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The answer to one question about a machine."""

    name: str
    status: Status
    """`failure` is what would stop a sweep, `warning` what would slow or endanger it."""
    value: str
    remedy: str = ""
    """What to do; empty where all is well."""

    @staticmethod
    def ok(name: str, value: str) -> Check:
        """Return the answer that all is well."""
        return Check(name=name, status="ok", value=value)

    @staticmethod
    def warning(name: str, value: str, remedy: str) -> Check:
        """Return the answer that a sweep would run, but worse than it could."""
        return Check(name=name, status="warning", value=value, remedy=remedy)

    @staticmethod
    def failure(name: str, value: str, remedy: str) -> Check:
        """Return the answer that no sweep would run, or not to its end."""
        return Check(name=name, status="failure", value=value, remedy=remedy)

    def to_json(self) -> dict[str, str]:
        """Return its fields."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Return the versions of Python and of what trials use, without importing any of it."""
    numbers = {"Python": platform.python_version()}
    for package in ("isoflop", "torch", "ray", "mlflow"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


def compiler(*, needed: bool) -> Check:
    """Return whether a C compiler and Python.h are here, with which Triton builds its launchers.

    Parameters
    ----------
    needed
        Whether there are GPUs: on CPUs nothing is compiled.
    """
    name, missing = "compiler", []
    named = os.environ.get("CC")
    program = next(filter(None, map(shutil.which, [named] if named else ["gcc", "clang"])), None)
    if program is None:
        missing.append(f"no C compiler ({f'CC={named}' if named else 'gcc or clang'}) on PATH")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        missing.append(f"no {headers}")
    if not missing:
        return Check.ok(name, f"{program}, {headers}")
    if not needed:
        return Check.ok(name, f"{'; '.join(missing)}: not needed without a GPU")
    return Check.warning(
        name,
        f"{'; '.join(missing)}: trials on GPUs would train without compilation, more slowly",
        "install gcc and Python's headers (apt install gcc python3-dev), or set CC",
    )


def memory() -> Check:
    """Return whether there is memory for one worker."""
    state = psutil.virtual_memory()
    value = f"{state.available / 1e9:.1f} of {state.total / 1e9:.1f} GB available"
    if state.available < WORKER_BYTES:
        return Check.warning(
            "memory",
            f"{value}; one worker takes {WORKER_BYTES / 1e9:.1f} GB",
            "end other programs, or use a machine with more memory",
        )
    return Check.ok("memory", value)


def disk(usage: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free) -> Check:
    """Return whether the directory for temporary files, where trials work, has room.

    Parameters
    ----------
    usage
        Returns the free bytes of a directory's disk.
    """
    place = Path(tempfile.gettempdir())
    free = usage(place)
    value, remedy = f"{free / 1e9:.1f} GB free in {place}", "set TMPDIR to a larger disk"
    if free < LEAST_DISK_BYTES:
        return Check.failure("disk", value, remedy)
    if free < DISK_BYTES:
        return Check.warning("disk", value, remedy)
    return Check.ok("disk", value)


def sockets() -> Check:
    """Return whether Ray's sockets fit below the directory for temporary files."""
    name = "temporary files"
    usual = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "/tmp"))
    try:
        with private_directory() as directory:
            if directory.is_relative_to(usual):
                return Check.ok(name, str(usual))
            place = directory.parent.parent
            return Check.ok(name, f"{usual} does not do for Ray's sockets: {place} is used")
    except InputError as error:
        reasons = str(error).removesuffix(f": {DIRECTORY_REMEDY}")
        return Check.failure(name, reasons, DIRECTORY_REMEDY)


def token() -> Check:
    """Return whether only its owner can read the token that opens Ray clusters."""
    name, path = "token", token_file()
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Check.ok(name, "in RAY_AUTH_TOKEN")
    if not os.access(path, os.R_OK):
        if "RAY_AUTH_TOKEN_PATH" in os.environ:
            return Check.failure(
                name,
                f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read",
                "correct RAY_AUTH_TOKEN_PATH, or unset it",
            )
        return Check.ok(name, "none, which only clusters need")
    if loose_token_file() is not None:
        return Check.warning(
            name,
            f"other users of this machine may read {path}, and with it run programs on the cluster",
            f"chmod 600 {path}, then make a new token if others use this machine",
        )
    return Check.ok(name, str(path))


def storage_checks(storage: Storage, clock: Callable[[], float] = time.time) -> list[Check]:
    """Write a file into the project's storage on condition that it is not there, and remove it.

    A directory that is not there yet is made and removed again. Links that lead out of the project
    are looked for before. The time that the storage gives
    the file is compared with `clock`.
    """
    name = "project"
    missing = _missing_directories(storage)
    try:
        require_no_way_out(storage)
        prove(storage)
        clocks = [_storage_clock(storage, clock)]
    except Outside as error:
        return [Check.failure(name, str(error).removesuffix(f": {NO_WAY_OUT}"), NO_WAY_OUT)]
    except InputError as error:
        remedy = "see that it is a directory or a bucket that this user may write to"
        return [Check.failure(name, str(error), remedy)]
    except OSError as error:
        remedy = "see whether the storage answers other programs"
        return [Check.failure(name, f"{storage.uri}: {reason_of(error)}", remedy)]
    finally:
        for directory in missing:
            with suppress(OSError):  # something is in it, or nothing was made
                directory.rmdir()
    return [Check.ok(name, f"{storage.uri}: conditional writes work"), *clocks]


def _missing_directories(storage: Storage) -> list[Path]:
    """Return the directories that a local storage would have to make, the innermost first."""
    local = storage.local
    places = [] if local is None else [local, *local.parents]
    return [place for place in places if not place.exists()]


def _storage_clock(storage: Storage, clock: Callable[[], float]) -> Check:
    """Compare the time that the storage gives a new file with the time at which it was written."""
    name = f".doctor-{uuid.uuid4().hex}"
    before = clock()
    try:
        storage.create(name, b"")
        after = clock()
        moment = storage.modified(name)
    finally:
        with suppress(OSError):
            storage.remove(name)
    name = "clock of the storage"
    if moment is None:
        return Check.ok(name, "unknown: the storage does not say when files were written")
    limit = REFUSED_SKEW_SECONDS if storage.local is None else None
    return clock_check(name, beyond(moment, before, after), limit=limit)


def beyond(moment: float, before: float, after: float) -> float:
    """Return how far a moment lies outside of an interval; negative if before it, in seconds.

    Examples
    --------
    >>> beyond(7.0, 5.0, 6.0), beyond(5.5, 5.0, 6.0), beyond(3.0, 5.0, 6.0)
    (1.0, 0.0, -2.0)
    """
    return max(0.0, moment - after) + min(0.0, moment - before)


def clock_check(name: str, skew: float, *, limit: float | None = None) -> Check:
    """Return whether another clock agrees with this machine's.

    Parameters
    ----------
    name
        Of the clock.
    skew
        Seconds by which it is ahead.
    limit
        From where on nothing works any more; None if there is no such point.
    """
    value = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    remedy = "synchronise the clocks (chrony or systemd-timesyncd)"
    if limit is not None and abs(skew) >= limit:
        return Check.failure(name, f"{value}: S3 refuses requests so far apart", remedy)
    if abs(skew) > SKEW_SECONDS:
        return Check.warning(name, f"{value}: times in the ledger mislead", remedy)
    return Check.ok(name, f"within {SKEW_SECONDS:.0f} s of this machine's")


def mlflow(store: Store) -> Check:
    """Return whether the MLflow store answers, and which version it is."""
    name, ours = "MLflow", version("mlflow")
    if store.uri.startswith("sqlite:///"):
        path = Path(store.uri.removeprefix("sqlite:///"))
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            return Check.warning(name, f"{path} cannot be written", "mend its permissions")
        return Check.ok(name, f"{store.shown}, MLflow {ours}")
    if not store.uri.startswith("http"):
        return Check.ok(name, f"{store.shown}, not asked")
    later = "start it, or correct --tracking-uri; meanwhile a sweep runs, and MLflow catches up"
    try:
        theirs = _server_version(store.uri)
    except ConnectionError as error:
        return Check.warning(name, f"{store.shown} {error}", later)
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        remedy = "install the same major version on both"
        return Check.warning(name, f"{store.shown} has MLflow {theirs}, this is {ours}", remedy)
    return Check.ok(name, f"{store.shown}, MLflow {theirs}")


def _server_version(uri: str) -> str:
    """Return the version that an MLflow server says it is, as its clients are allowed in.

    Raises
    ------
    ConnectionError
        Saying why there is none.
    """
    import requests

    user, password = (os.environ.get(f"MLFLOW_TRACKING_{x}") for x in ("USERNAME", "PASSWORD"))
    bearer = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/version",
            headers={"Authorization": f"Bearer {bearer}"} if bearer else {},
            auth=(user, password) if user and password else None,
            timeout=MLFLOW_SECONDS,
        )
    except requests.exceptions.RequestException as error:
        raise ConnectionError(f"does not answer ({type(error).__name__})") from error
    if answer.status_code != 200:
        raise ConnectionError(f"answers with status {answer.status_code}")
    text = answer.text.strip()
    if not text[:1].isdigit() or len(text) > 40:
        raise ConnectionError("answers, but is no MLflow server")
    return text
