"""The command line: the verbs that plan, train and keep. Those of `cli_analysis.py` join them.

Thin: every verb parses, calls one function and prints what it gave. Nothing heavy is imported
before a verb needs it, so that help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.errors import InputError
from orchestrator.cli_analysis import add_verbs
from orchestrator.options import (
    Columns,
    Json,
    Loss,
    ProjectPath,
    Where,
    console,
    print_json,
    read_as,
)

if TYPE_CHECKING:
    from orchestrator.loop import Outcome

STARTED = time.time()
INTERRUPTED = 130

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
ProjectOption = Annotated[
    Path | None,
    typer.Option(
        "--project",
        metavar="DIR",
        help="Where observations go. Default: the project that the sweep file lies in, "
        "else projects/NAME.",
    ),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options before the verb."""


@app.command()
def mini(project: ProjectOption = None, as_json: Json = False) -> None:
    """Run the whole loop on this machine, in minutes: 28 small trainings on real text.

    Example: `isoflop mini --project projects/mini`
    """
    _run(Path(__file__).with_name("mini.toml"), project or Path("projects/mini"), as_json)


@app.command()
def run(spec: Spec, project: ProjectOption = None, as_json: Json = False) -> None:
    """Train a sweep, or what is missing of it; then fit, propose and report.

    Example: `isoflop run projects/mini/next.toml`
    """
    _run(spec, project, as_json)


@app.command()
def plan(spec: Spec, as_json: Json = False) -> None:
    """Show the trials of a sweep and what they cost, without training.

    Example: `isoflop plan examples/cluster.toml`
    """
    from orchestrator.planner import make_plan
    from orchestrator.spec import read_spec

    made = make_plan(read_spec(spec))
    if as_json:
        print_json(made.summary())
        return
    from orchestrator.summary import show_plan

    show_plan(console(), made)


@app.command()
def status(project: ProjectPath, as_json: Json = False) -> None:
    """Show what is done, diverged, failed and waiting.

    Example: `isoflop status projects/mini`
    """
    from orchestrator.external import external_counts
    from orchestrator.project import counts, open_project

    opened = open_project(project)
    plans, external = opened.plans(), external_counts(opened)
    if as_json:
        states = ("complete", "diverged", "failed", "waiting")
        found = {made.name: counts(opened.outcomes(made)) for made in plans}
        print_json(
            {
                "project": str(opened.path),
                "plans": [{"name": k, **{s: v[s] for s in states}} for k, v in found.items()],
                "external": [{"name": k, "complete": n} for k, n in external.items()],
                "failures": [
                    {k: v for k, v in record.items() if k != "traceback"}
                    for record in opened.ledger.failures()
                ],
            }
        )
        return
    from orchestrator.summary import show_status

    show_status(console(), opened, plans, external)


add_verbs(app)


@app.command()
def add(
    project: ProjectPath,
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A .csv or .parquet file.")],
    columns: Columns = None,
    where: Where = None,
    loss: Loss = None,
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

    found = points(read_table(runs), runs.name, read_as(columns, where, loss=loss))
    called = name or runs.stem
    added = add_runs(project, found.found.obs, called)
    excluded = [{"reason": reason, "count": n} for reason, n in found.excluded.items()]
    if as_json:
        counted = {"added": added.written, "known": added.known, "excluded": excluded}
        print_json({"project": str(project), "name": called, **counted, "warnings": found.notes})
        return
    known = f", {added.known} were there already" if added.known else ""
    console().print(f"{added.written} runs of {called} added to {project}{known}")
    for reason, n in found.excluded.items():
        console().print(f"{n} rows not added: {reason}", markup=False)
    for note in found.notes:
        console().print(note, markup=False)


@app.command()
def ui(
    project: ProjectPath,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")
    ] = 5000,
) -> None:
    """Open the project in the MLflow UI, on this machine only. Ctrl-C ends it.

    Example: `isoflop ui projects/mini --port 5001`
    """
    from orchestrator.project import open_project
    from orchestrator.ui import serve

    serve(open_project(project), port, console())


def _run(spec: Path, directory: Path | None, as_json: bool) -> None:
    from orchestrator.planner import make_plan
    from orchestrator.project import create_project, directory_for
    from orchestrator.spec import read_spec

    made = make_plan(read_spec(spec))
    project = create_project(directory or directory_for(spec, made.name))
    from orchestrator.loop import run as run_loop

    outcome = run_loop(project, made, console(stderr=True), started=STARTED)
    if as_json:
        print_json(outcome.to_json())
    else:
        _show(outcome)
    if not outcome.finished:
        done = outcome.states.get("complete", 0) + outcome.states.get("diverged", 0)
        failed = outcome.states.get("failed", 0)
        what = f"{failed} failed (see attempts/)" if failed else "interrupted"
        print(
            f"isoflop: {done} of {len(made.planned)} observations are in the ledger, {what}; "
            "run the same command again to go on",
            file=sys.stderr,
        )
        raise _Told(1 if failed else INTERRUPTED)


class _Told(SystemExit):
    """An end of which the user has been told."""


def _show(outcome: Outcome) -> None:
    from orchestrator.summary import show_files, show_study

    printed = console()
    if outcome.study is not None:
        show_study(printed, outcome.study)
        show_files(printed, outcome.project, outcome.proposal)
    if outcome.tracking_error:
        printed.print(
            f"[yellow]! MLflow lacks some runs ({outcome.tracking_error}); the next run of a sweep "
            "in this project writes them"
        )
    printed.print(
        f"{outcome.trained} trained now, {outcome.seconds:.0f} s, "
        f"{outcome.training_share:.0%} of it training"
    )


def main() -> None:
    """Run the command line; errors meant for people become one sentence."""
    debug = "--debug" in sys.argv or os.environ.get("ISOFLOP_DEBUG") == "1"
    try:
        app()
    except InputError as error:
        if debug:
            raise
        print(f"isoflop: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this exit code and says nothing.
        if ended.code == INTERRUPTED and not isinstance(ended, _Told):
            print("isoflop: interrupted", file=sys.stderr)
        raise
