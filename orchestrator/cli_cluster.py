"""The verb that runs a sweep on a cluster that this machine is no part of: submit.

Thin: parses, calls `cluster/submit.py` and says what became of the job. Nothing heavy is imported
before the verb needs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.errors import InputError
from orchestrator.options import Told

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from cluster.submit import Job

INTERRUPTED = 130
JOB, RUN = "The job", "The run"


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verbs, in the order of its help."""
    app.command()(submit)


def submit(
    sweep: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(
            "--project",
            metavar="URI",
            help="Where observations go: s3://..., gs://..., or an absolute path that all nodes "
            "share.",
            rich_help_panel=RUN,
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            metavar="URI",
            help="The MLflow server, as the cluster reaches it.",
            rich_help_panel=RUN,
        ),
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="The sweep may add trials to the plan of its name.",
            rich_help_panel=RUN,
        ),
    ] = False,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="URL",
            envvar="RAY_API_SERVER_ADDRESS",
            help="The dashboard of the cluster's head.",
        ),
    ] = "http://127.0.0.1:8265",
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="The cluster asks for no token.")
    ] = False,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Print the job's id and end at once.", rich_help_panel=JOB),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Environment of the job, readable by all who see the dashboard; repeatable.",
            rich_help_panel=JOB,
        ),
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(
            "--pip",
            metavar="PACKAGE",
            help="Have every node install it for this job; repeatable.",
            rich_help_panel=JOB,
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            "--working-dir",
            metavar="DIR",
            help="Send this directory too; the job finds it as user/.",
            rich_help_panel=JOB,
        ),
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option("--follow", metavar="JOB", help="Instead: show a job until it ends."),
    ] = None,
    cancel: Annotated[
        str | None,
        typer.Option("--cancel", metavar="JOB", help="Instead: end a job, checkpoints written."),
    ] = None,
) -> None:
    """Run a sweep as a Ray job on a cluster; show its log and exit as it does.

    Ctrl-C leaves the job running. What is not named here travels with the job: isoflop itself, the
    sweep file, and the corpus files that it names relative to itself.

    Example: `isoflop submit sweep.toml --project s3://ours/sweeps --address http://HEAD:8265`
    """
    if sum(given is not None for given in (sweep, follow, cancel)) != 1:
        raise InputError("give one of these: a sweep file, --follow JOB or --cancel JOB")
    job = None
    if sweep is not None:
        job = _job(
            sweep, project, tracking_uri, extend=extend, env=env or [], pip=pip or [],
            working_dir=working_dir,
        )  # fmt: skip
    from cluster.dashboard import connect, find_token
    from cluster.submit import submit as send

    client = connect(address, None if no_auth else find_token())
    options = f"--address {address}" + (" --no-auth" if no_auth else "")
    if cancel is not None:
        _cancel(client, cancel)
        return
    job_id = follow or ""
    if job is not None:
        job_id = send(client, job)
        if no_wait:
            print(job_id)
            return
        _say(f"job {job_id} submitted")
    _follow(client, job_id, options)


def _job(
    sweep: Path,
    project: str | None,
    tracking_uri: str | None,
    *,
    extend: bool,
    env: list[str],
    pip: list[str],
    working_dir: Path | None,
) -> Job:
    """The job that runs a sweep on the cluster that it finds itself on."""
    import analysis
    import cluster
    import orchestrator
    import trainers
    from cluster.submit import Job
    from orchestrator.shipping import pack

    if project is None or not ("://" in project or project.startswith("/")):
        given = "is missing" if project is None else f"is {project!r}"
        raise InputError(
            f"--project {given}; it must be storage that all nodes of the cluster share: "
            "s3://..., gs://... or an absolute path"
        )
    if working_dir is not None and not working_dir.is_dir():
        raise InputError(f"--working-dir {working_dir} is no directory")
    shipment = pack(sweep)
    command = ["python", "-m", "orchestrator", "run", shipment.sweep, "--address", "auto"]
    command += ["--project", project]
    command += ["--tracking-uri", tracking_uri] if tracking_uri else []
    command += ["--extend"] if extend else []
    rooms = (analysis, trainers, cluster, orchestrator)
    return Job(
        name=f"isoflop-{shipment.spec.name}",
        command=tuple(command),
        packages=tuple(Path(room.__path__[0]) for room in rooms),
        files=shipment.files,
        directory=working_dir,
        environment=dict(_variable(item) for item in env),
        pip=tuple(pip),
    )


def _variable(item: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not (name and sign):
        raise InputError(f"--env {item}: write NAME=VALUE")
    return name, value


def _follow(client: JobSubmissionClient, job_id: str, options: str) -> None:
    """Show a job until it ends, and exit as it does; Ctrl-C ends the showing alone."""
    from cluster.submit import LostContactError, follow

    again = f"`isoflop submit --follow {job_id} {options}`"
    try:
        code = follow(client, job_id, _print)
    except KeyboardInterrupt:
        _say(
            f"no longer following; job {job_id} goes on: {again} shows it again, "
            f"`isoflop submit --cancel {job_id} {options}` ends it"
        )
        raise Told(INTERRUPTED) from None
    except LostContactError as error:
        _say(f"the dashboard answers no more ({error}); job {job_id} may go on: {again}")
        raise Told(1) from None
    if code == INTERRUPTED:
        _say(f"job {job_id} was interrupted; submit the sweep again to go on")
    elif code:
        _say(f"job {job_id} failed with exit code {code}")
    if code:
        raise Told(code)


def _cancel(client: JobSubmissionClient, job_id: str) -> None:
    from cluster.submit import cancel

    was_running = cancel(client, job_id)
    _say(f"job {job_id} was interrupted" if was_running else f"job {job_id} had ended already")


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(f"isoflop: {text}", file=sys.stderr)
