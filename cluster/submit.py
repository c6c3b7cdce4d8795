"""Ray jobs: how they start on a cluster, following them, cancelling them.

Knows nothing of sweeps: a job is a command, files (see `cluster.package`), and the packages that
the command imports. Those are the first thing on the import path of the job's driver and of all its
workers, so that nothing of the same name in the user's directory or on the cluster's nodes is
imported instead.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import InputError, first_line
from cluster.package import packed

if TYPE_CHECKING:
    from ray.job_submission import JobDetails as JobInfo
    from ray.job_submission import JobSubmissionClient

STOP_SECONDS = 120
"""A cancelled job is interrupted, and killed if it has not ended after this."""
CANCELLED = 130
CONTACT_SECONDS = 60.0
"""A dashboard that has been silent for so long is given up; the job is not."""
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


class LostContactError(Exception):
    """The dashboard answers no more. The job may still be running."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run on a cluster."""

    name: str
    """The beginning of its id."""
    command: tuple[str, ...]
    """Run in the job's working directory."""
    packages: tuple[Path, ...]
    """Directories of Python packages that it imports."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Place in the job's working directory -> local file."""
    directory: Path | None = None
    """The user's own, to be found at `package.USER_DIRECTORY`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of driver and workers. Anybody who can see the dashboard can read it."""
    pip: tuple[str, ...] = ()
    """Requirements that Ray installs on every node for this job."""


def submit(
    client: JobSubmissionClient, job: Job, announce: Callable[[str], None] = lambda text: None
) -> str:
    """Send a job off; return its id. What is sent of the user's is announced before it is.

    Raises
    ------
    InputError
        If its files are too large or cannot be read, or the cluster refuses it.
    """
    made = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    job_id = f"{re.sub('[^A-Za-z0-9._-]', '-', job.name)}-{made}-{os.urandom(2).hex()}"
    with packed(packages=job.packages, files=job.files, directory=job.directory) as package:
        announce(f"sending isoflop itself and {package.summary}")
        environment: dict[str, object] = {
            "working_dir": str(package.path),
            "env_vars": {**_STOP, **job.environment},
        }
        if job.pip:
            environment["pip"] = list(job.pip)
        try:
            # The shell that Ray starts must not stay between the driver and its signals.
            return client.submit_job(
                entrypoint="exec " + shlex.join(job.command),
                runtime_env=environment,
                submission_id=job_id,
            )
        except (OSError, RuntimeError, ValueError) as error:
            if "status code 413" in str(error):
                raise InputError(
                    "the job's files have more than the 100 MiB, compressed, that a dashboard "
                    "takes: put what is large on storage that all nodes share, and name what the "
                    "job does not need in a .gitignore"
                ) from error
            if "No available agent" in str(error):
                raise InputError(
                    "the cluster's head has no agent that takes jobs: it may still be starting; if "
                    "another Ray has its port 52365, on a machine that both are on, start this one "
                    "with --dashboard-agent-listen-port=0"
                ) from error
            raise InputError(f"the cluster does not take the job: {first_line(error)}") from error


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], None]) -> int:
    """Pass a job's log on until it ends; return its exit code, `CANCELLED` if it was stopped.

    Raises
    ------
    InputError
        If there is no such job.
    LostContactError
        If the dashboard answers no more.
    """
    import aiohttp

    require(client, job_id)
    log = _Log(write)
    silent_since: float | None = None
    while True:
        try:
            asyncio.run(log.tail(client, job_id))
            info = client.get_job_info(job_id)
            silent_since = None
            if info.status.is_terminal():
                return _exit_code(info, write)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > CONTACT_SECONDS:
                raise LostContactError(first_line(error)) from error
        time.sleep(1.0)


class _Log:
    """A job's log, of which every character is written once, however often contact breaks."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    async def tail(self, client: JobSubmissionClient, job_id: str) -> None:
        """Write what is new until the server closes; it tells the log from its beginning."""
        seen = 0
        async for text in client.tail_job_logs(job_id):
            fresh = text[max(0, self._written - seen) :]
            seen += len(text)
            self._written = max(self._written, seen)
            if fresh:
                self._write(fresh)


def cancel(client: JobSubmissionClient, job_id: str) -> bool:
    """Interrupt a job, so that it writes its checkpoints; return whether it was running.

    Returns once it has ended.

    Raises
    ------
    InputError
        If there is no such job.
    """
    if require(client, job_id).status.is_terminal():
        return False
    running = client.stop_job(job_id)
    deadline = time.monotonic() + STOP_SECONDS + 30
    while not client.get_job_info(job_id).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    return running


def require(client: JobSubmissionClient, job_id: str) -> JobInfo:
    """What the cluster knows of a job.

    Raises
    ------
    InputError
        If that is nothing; the message names the jobs that there are.
    """
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        known = [info.submission_id for info in client.list_jobs() if info.submission_id]
        there = ", ".join(sorted(known)[-5:]) or "none"
        raise InputError(f"there is no job {job_id} on this cluster; there are: {there}") from error


def _exit_code(info: JobInfo, write: Callable[[str], None]) -> int:
    if info.status.name == "SUCCEEDED":
        return 0
    if info.status.name == "STOPPED":
        return CANCELLED
    code = info.driver_exit_code
    if code is None:  # it never started, or its node died
        write(f"{info.message or 'the job failed without a message'}\n")
        return 1
    return code if code > 0 else 128 - code
