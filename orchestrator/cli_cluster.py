"""The verbs of clusters: submit, for one that this machine is no part of, and doctor.

Thin: they parse, call `cluster/submit.py` or `doctor.py` and say what came of it. Nothing heavy is
imported before a verb needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.errors import InputError
from analysis.visible import visible
from orchestrator.grouped import grouped
from orchestrator.options import (
    INTERRUPTED,
    Address,
    Json,
    Running,
    Told,
    TrackingUri,
    console,
    print_json,
    say,
)

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from cluster.dashboard import Token
    from cluster.submit import Job

JOB = "The job"


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verbs, in the order of its help."""
    app.command()(grouped(submit))
    app.command()(doctor)


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What a job takes with it, and whether it is followed."""

    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Print the job's id and end at once.", rich_help_panel=JOB),
    ] = False
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Environment of the job, readable by all who see the dashboard; repeatable.",
            rich_help_panel=JOB,
        ),
    ] = None
    pip: Annotated[
        list[str] | None,
        typer.Option(
            "--pip",
            metavar="PACKAGE",
            help="Have every node install it for this job; repeatable.",
            rich_help_panel=JOB,
        ),
    ] = None
    working_dir: Annotated[
        Path | None,
        typer.Option(
            "--working-dir",
            metavar="DIR",
            help="Send this directory too, without its dotfiles; the job finds it as user/.",
            rich_help_panel=JOB,
        ),
    ] = None


def submit(
    running: Running,
    sending: Sending,
    sweep: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")
    ] = None,
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

    Ctrl-C leaves the job running. With it travel isoflop itself, the sweep file, and the corpus
    files that the sweep names by a relative path and that lie beside it; it says how much that is.
    Project and MLflow are as the cluster sees them.

    Example: `isoflop submit sweep.toml --project s3://ours/sweeps --address http://HEAD:8265`
    """
    if sum(given is not None for given in (sweep, follow, cancel)) != 1:
        raise InputError("give one of these: a sweep file, --follow JOB or --cancel JOB")
    if sweep is None:
        _refuse_with("--follow" if cancel is None else "--cancel", running, sending)
    job = None if sweep is None else _job(sweep, running, sending)
    from cluster.dashboard import connect, find_token, loose_token_file, readable_on_the_way
    from cluster.submit import submit as send

    token = None if no_auth else find_token()
    if token is not None:
        for warning in filter(None, (loose_token_file(), readable_on_the_way(address))):
            say(f"warning: {warning}")
    client = connect(address, token)
    options = f"--address {address}" + (" --no-auth" if no_auth else "")
    if cancel is not None:
        _cancel(client, cancel)
        return
    job_id = follow or ""
    if job is not None:
        _warn_of_paths(str(running.project), address, token)
        job_id = send(client, job, say)
        if sending.no_wait:
            print(visible(job_id))
            return
        say(f"job {job_id} submitted")
    _follow(client, job_id, options)


def doctor(
    project: Annotated[
        str | None,
        typer.Argument(
            metavar="PROJECT", help="A project to try: a directory, s3://... or gs://..."
        ),
    ] = None,
    given: Annotated[
        str | None, typer.Option("--project", metavar="DIR|URI", help="The same, as an option.")
    ] = None,
    address: Address = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Look for what would stop a sweep, here and on every node of a cluster.

    Versions, GPUs, compiler, memory, disk, the project's storage, MLflow, token and clocks; with
    what to do about each that is not well. The exit code is 1 if something would stop a sweep.

    Example: `isoflop doctor /shared/projects/cluster --address auto`
    """
    if project is not None and given is not None:
        raise InputError(f"the project is {project} and --project {given}: give one of them")
    from orchestrator.doctor import examine, show

    with console(stderr=True).status("looking …"):
        report = examine(given if project is None else project, address, tracking_uri)
    if as_json:
        print_json(report.to_json())
    else:
        show(console(), report)
    if not report.healthy:
        raise Told(1)


def _refuse_with(option: str, *groups: Any) -> None:
    """Refuse options that say how a new job runs."""
    given = [
        f"--{name.replace('_', '-')}"
        for group in groups
        for name, value in vars(group).items()
        if value
    ]
    if given:
        raise InputError(
            f"{option} is of a job that is there, and {', '.join(given)} of a new one: leave out "
            "the one or the other"
        )


def _job(sweep: Path, running: Running, sending: Sending) -> Job:
    """The job that runs a sweep on the cluster that it finds itself on."""
    from cluster.submit import Job
    from orchestrator.proof import rooms
    from orchestrator.shipping import pack

    project = _shared(running.project)
    if sending.working_dir is not None and not sending.working_dir.is_dir():
        raise InputError(f"--working-dir {sending.working_dir} is no directory")
    _refuse_secrets(running, sending)
    shipment = pack(sweep, sending.working_dir)
    command = ["python", "-m", "orchestrator", "run", shipment.sweep, "--address", "auto"]
    command += ["--project", project]
    command += ["--tracking-uri", running.tracking_uri] if running.tracking_uri else []
    command += ["--extend"] if running.extend else []
    return Job(
        name=f"isoflop-{shipment.spec.name}",
        command=tuple(command),
        packages=rooms(),
        files=shipment.files,
        directory=sending.working_dir,
        environment=dict(_variable(item) for item in sending.env or []),
        pip=tuple(sending.pip or []),
    )


def _refuse_secrets(running: Running, sending: Sending) -> None:
    """Refuse secrets in what the dashboard, Ray's files and the process list would show."""
    from orchestrator.masking import masked, names_secret, shows_secret

    shown = "and everybody who sees the dashboard or the list of processes could read it"
    start = "in the environment in which Ray starts on the cluster's"
    uri = running.tracking_uri
    if uri and shows_secret(uri):
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        given = login if uri.lower().startswith("http") else "MLFLOW_TRACKING_URI"
        raise InputError(
            f"--tracking-uri {masked(uri)} has a password, {shown}: leave it out, and set "
            f"{given} {start} head"
        )
    for name, value in map(_variable, sending.env or []):
        if names_secret(name) or shows_secret(value):
            raise InputError(f"--env sets the secret {name}, {shown}: set it {start} nodes")
    for item in filter(shows_secret, sending.pip or []):
        raise InputError(
            f"--pip {masked(item)} has a password, {shown}: set PIP_INDEX_URL {start} nodes"
        )


def _shared(project: str | None) -> str:
    """The project, if all nodes of a cluster could see it."""
    from orchestrator.storage import is_uri, scheme_and_place

    if project is None or not (is_uri(project) or Path(project).is_absolute()):
        given = "is missing" if project is None else f"is {project!r}"
        raise InputError(
            f"--project {given}; it must be storage that all nodes of the cluster share: "
            "s3://..., gs://... or an absolute path"
        )
    scheme_and_place(project)
    return project


def _warn_of_paths(project: str, address: str, token: Token | None) -> None:
    """Say what a path as a project asks of a cluster of several machines."""
    from cluster.dashboard import hosts
    from orchestrator.storage import scheme_and_place

    if scheme_and_place(project)[0] == "file" and len(there := hosts(address, token)) > 1:
        say(
            f"warning: --project {project} must be on a file system that all {len(there)} machines "
            "of the cluster share, mounted at the same place; the job fails if it is not"
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
        say(
            f"no longer following; job {job_id} goes on: {again} shows it again, "
            f"`isoflop submit --cancel {job_id} {options}` ends it"
        )
        raise Told(INTERRUPTED) from None
    except LostContactError as error:
        say(f"the dashboard answers no more ({error}); job {job_id} may go on: {again}")
        raise Told(1) from None
    if code == INTERRUPTED:
        say(f"job {job_id} was interrupted; submit the sweep again to go on")
    elif code:
        say(f"job {job_id} failed with exit code {code}")
    if code:
        raise Told(code)


def _cancel(client: JobSubmissionClient, job_id: str) -> None:
    from cluster.submit import cancel

    was_running = cancel(client, job_id)
    say(f"job {job_id} was interrupted" if was_running else f"job {job_id} had ended already")


def _print(text: str) -> None:
    print(visible(text), end="", flush=True)
