"""The command line: the verbs that plan, train and keep. Those of `cli_analysis.py` join them.

Thin: every verb parses, calls one function and prints what it gave. Nothing heavy is imported
before a verb needs it, so that help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from analysis.errors import InputError
from analysis.visible import visible
from analysis.wording import plural
from orchestrator import (
    cli_analysis,
    cli_cluster,
    cli_models,
    cli_sync,
    cli_tune,
    cli_verify,
)
from orchestrator.grouped import grouped
from orchestrator.options import (
    INTERRUPTED,
    Address,
    Json,
    Machines,
    MeasuredProject,
    ProjectOption,
    ProjectPath,
    Rows,
    Running,
    Told,
    console,
    print_json,
    say,
    show_plain_warnings,
)

if TYPE_CHECKING:
    from orchestrator.loop import Outcome

STARTED = time.time()

app = typer.Typer(
    name="isoflop",
    help="Scaling-law sweeps: given a compute budget, how large a model, on how many tokens, "
    "and what loss will come out?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"isoflop {version('isoflop')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Show the version, and exit."
        ),
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def mini(project: ProjectOption = None, as_json: Json = False) -> None:
    """Run the whole loop on this machine, in minutes: 28 small trainings on real text.

    Example: `isoflop mini --project projects/mini`
    """
    running = Running(project=project or "projects/mini")
    _run(Path(__file__).with_name("mini.toml"), running, as_json)


@app.command()
@grouped
def run(spec: Spec, running: Running, address: Address = None, as_json: Json = False) -> None:
    """Train a sweep, or what is missing of it; then fit, propose and report.

    Example: `isoflop run projects/mini/next.toml`
    """
    _run(spec, running, as_json, address=address)


@app.command()
@grouped
def plan(
    spec: Spec, machines: Machines, project: MeasuredProject = None, as_json: Json = False
) -> None:
    """Show the trials of a sweep, where they run and what they cost, without training.

    Example: `isoflop plan examples/cluster.toml --gpu H100 --nodes 8 --price-per-gpu-hour 2.5`
    """
    from orchestrator.estimate import estimate, measured_pace
    from orchestrator.planner import make_plan
    from orchestrator.spec import read_spec

    made = make_plan(machines.applied(read_spec(spec)))
    found = estimate(made, pace=measured_pace(spec, made.name, project))
    if as_json:
        print_json(found.to_json())
    else:
        from orchestrator.plan_view import show_plan

        show_plan(console(), found)
    if found.unplaceable and found.asked:
        say(
            f"of {len(made.trials)} trials {len(found.unplaceable)} would fit nowhere on "
            f"{found.cluster}: give larger GPUs or more of them, or smaller budgets"
        )
        raise Told(2)


cli_cluster.add_verbs(app)


@app.command()
def status(project: ProjectPath, as_json: Json = False) -> None:
    """Show what is done, running, failed and waiting; from any machine that sees the project.

    Example: `isoflop status s3://bucket/runs`
    """
    from orchestrator.project import open_project
    from orchestrator.status import show_status
    from orchestrator.status import status as read_status

    found = read_status(open_project(project))
    if as_json:
        print_json(found.to_json())
    else:
        show_status(console(), found)


cli_tune.add_verbs(app)
cli_sync.add_verbs(app)
cli_verify.add_verbs(app)
cli_analysis.add_verbs(app)
cli_models.add_verbs(app)


@app.command()
@grouped
def add(
    project: ProjectPath,
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", help="A table: .csv, .jsonl or .parquet.")
    ],
    rows: Rows,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the runs are called. Default: the file's name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put runs that were trained elsewhere into a project's ledger, marked as external.

    Example: `isoflop add projects/ours runs.csv --columns params=size,tokens=seen,loss=val`
    """
    from analysis.files import read_table
    from orchestrator.external import add as add_runs
    from orchestrator.source import points

    found = points(read_table(runs), runs.name, rows.reading())
    called = name or Path(runs.name.removesuffix(".gz")).stem
    added = add_runs(project, found.found.obs, called)
    excluded = [{"reason": reason, "count": n} for reason, n in found.excluded.items()]
    if as_json:
        counted = {"added": added.written, "known": added.known, "excluded": excluded}
        print_json({"project": str(project), "name": called, **counted, "warnings": found.notes})
        return
    known = f", {added.known} known already" if added.known else ""
    console().print(f"{plural(added.written, 'run')} of {called} added to {project}{known}")
    for reason, n in found.excluded.items():
        console().print(f"{plural(n, 'row')} not added: {reason}")
    for note in found.notes:
        console().print(note)


@app.command()
def ui(
    project: ProjectPath,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")
    ] = 5000,
    password: Annotated[
        bool,
        typer.Option(
            "--password",
            help="Let in whoever knows a new password, which is printed; for browsers of Windows "
            "under WSL.",
        ),
    ] = False,
) -> None:
    """Open the project in the MLflow UI, on this machine only. Ctrl-C ends it.

    Other users of this machine see that it runs, on which port and on which project, and are
    refused: on Linux it answers your own processes only, elsewhere it asks for a password. Whoever
    is let in can read and change the runs, and any file that you can: see docs/trust.md.

    Example: `isoflop ui projects/mini --port 5001`
    """
    from orchestrator.project import open_project
    from orchestrator.ui import serve

    serve(open_project(project), port, console(), ask_password=password)


def _run(spec: Path, running: Running, as_json: bool, *, address: str | None = None) -> None:
    from orchestrator.connection import check, prepare
    from orchestrator.family import corpus_caution
    from orchestrator.planner import make_plan
    from orchestrator.probes import cautions
    from orchestrator.project import create_project, directory_for
    from orchestrator.spec import read_spec

    prepare(address)
    if address is not None:
        check(address)
        from cluster.dashboard import loose_token_file

        if warning := loose_token_file():
            console(stderr=True).print(f"! {warning}", style="yellow")
    made = make_plan(read_spec(spec))
    for caution in (*cautions(made), *filter(None, [corpus_caution(made.spec)])):
        console(stderr=True).print(f"! {caution}", style="yellow")
    project = create_project(running.project or directory_for(spec, made.name))
    from orchestrator.loop import run as run_loop

    outcome = run_loop(
        project,
        made,
        console(stderr=True),
        started=STARTED,
        address=address,
        tracking_uri=running.tracking_uri,
        extend=running.extend,
    )
    if as_json:
        print_json(outcome.to_json())
    else:
        _show(outcome)
    if not outcome.finished:
        say(outcome.shortfall)
        raise Told(outcome.exit_code)


def _show(outcome: Outcome) -> None:
    from orchestrator.summary import show_files, show_study

    printed = console()
    if outcome.study is not None:
        show_study(printed, outcome.study)
        show_files(printed, outcome.project, outcome.proposal)
    if outcome.tracking_error:
        printed.print(f"! {outcome.tracking_error}", style="yellow")
    share = f", {outcome.training_share:.0%} of it training" if outcome.trained else ""
    printed.print(f"{outcome.trained} trained now, {outcome.seconds:.0f} s{share}")


def main() -> None:
    """Run the command line; errors meant for people become one sentence."""
    show_plain_warnings()
    try:
        app()
    except InputError as error:
        _end(error, 2)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _end(error, 2)  # a path that the user can correct
    except OSError as error:  # a disk that is full, a store that does not answer
        _end(error, 1)
    except Exception:  # a mistake of ours: its traceback may quote what somebody else wrote
        sys.stderr.write(visible(traceback.format_exc()))
        sys.exit(1)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this exit code and says nothing.
        if ended.code == INTERRUPTED and not isinstance(ended, Told):
            say("interrupted")
        raise


def _end(error: InputError | OSError, code: int) -> NoReturn:
    """Say what is wrong, where it is wanted with the traceback, and exit with that code."""
    if "--debug" in sys.argv or os.environ.get("ISOFLOP_DEBUG") == "1":
        sys.stderr.write(visible("".join(traceback.format_exception(error))))
        sys.exit(1)
    say(str(error))
    sys.exit(code)
