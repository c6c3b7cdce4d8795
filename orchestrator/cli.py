"""The command line. Thin: every verb parses, calls one function and prints what it gave.

Nothing heavy is imported before a verb needs it, so that help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from analysis.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.conclusion import Convention, Evidence
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
ProjectPath = Annotated[Path, typer.Argument(metavar="PROJECT", help="A project directory.")]
ProjectOption = Annotated[
    Path | None,
    typer.Option(
        "--project",
        metavar="DIR",
        help="Where observations go. Default: the project that the sweep file lies in, "
        "else projects/NAME.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="COLUMN=VALUE", help="Select observations of one kind; repeatable."
    ),
]
Params = Annotated[
    str, typer.Option("--params", help="How N counts: non_embedding, matmul or total.")
]
Flops = Annotated[str, typer.Option("--flops", "--flops-as", help="How C counts: exact or 6nd.")]
FlopsAs = Annotated[str, typer.Option("--flops-as", help="How C counts: exact or 6nd.")]
Level = Annotated[float, typer.Option("--level", help="Coverage of intervals, between 0 and 1.")]


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
        _print_json(made.summary())
        return
    from orchestrator.summary import show_plan

    show_plan(_console(), made)


@app.command()
def status(project: ProjectPath, as_json: Json = False) -> None:
    """Show what is done, diverged, failed and waiting.

    Example: `isoflop status projects/mini`
    """
    from orchestrator.project import counts, open_project

    opened = open_project(project)
    plans = opened.plans()
    if as_json:
        states = ("complete", "diverged", "failed", "waiting")
        found = {made.name: counts(opened.outcomes(made)) for made in plans}
        _print_json(
            {
                "project": str(opened.path),
                "plans": [{"name": k, **{s: v[s] for s in states}} for k, v in found.items()],
                "failures": [
                    {k: v for k, v in record.items() if k != "traceback"}
                    for record in opened.ledger.failures()
                ],
            }
        )
        return
    from orchestrator.summary import show_status

    show_status(_console(), opened, plans)


@app.command()
def fit(
    project: ProjectPath,
    where: Where = None,
    params: Params = "non_embedding",
    flops_as: Flops = "exact",
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Fit the laws to everything that a project holds.

    Example: `isoflop fit projects/mini --params total`
    """
    from analysis.study import require_laws, to_json

    found = _evidence(project, where).study(_convention(params, flops_as, level))
    require_laws(found)
    if as_json:
        _print_json(to_json(found))
        return
    from orchestrator.summary import show_study

    show_study(_console(), found)


@app.command()
def forecast(
    project: ProjectPath,
    flops: Annotated[float, typer.Option("--flops", help="The compute budget C, in FLOPs.")],
    where: Where = None,
    params: Params = "non_embedding",
    flops_as: FlopsAs = "exact",
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Say how large a model to train on how many tokens at a budget, and the loss to expect.

    Example: `isoflop forecast projects/mini --flops 1e13`
    """
    from analysis.study import forecast_json, require_laws

    _require_positive("--flops", flops)
    found = _evidence(project, where).study(_convention(params, flops_as, level), flops)
    require_laws(found)
    assert found.next is not None
    if as_json:
        excluded = [{"reason": r, "count": n} for r, n in found.excluded.items()]
        convention = {"params": params, "flops": flops_as}
        _print_json(forecast_json(found.next) | {"convention": convention, "excluded": excluded})
        return
    from orchestrator.summary import show_forecast

    show_forecast(_console(), found)


@app.command()
def propose(
    project: ProjectPath,
    flops: Annotated[
        float | None, typer.Option("--flops", help="FLOPs of each trial. Default: the next budget.")
    ] = None,
    spend: Annotated[
        float | None, typer.Option("--spend", help="FLOPs of all trials together, at most.")
    ] = None,
    sizes: Annotated[int, typer.Option("--sizes", help="Model sizes.")] = 7,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The sweep file to write. Default: PROJECT/next.toml"),
    ] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Write the next sweep: sizes around the forecast, spanning its uncertainty.

    Example: `isoflop propose projects/mini --spend 2e13`
    """
    from orchestrator.conclusion import propose_next

    _require_positive("--flops", flops)
    _require_positive("--spend", spend)
    found = _evidence(project, where)
    path = output or found.project.proposal
    chosen, made = propose_next(found, output=path, flops=flops, spend=spend, sizes=sizes)
    if as_json:
        _print_json(
            {
                "proposal": str(path),
                "flops": chosen.flops,
                "convention": {"params": "non_embedding", "flops": "exact"},
                "params": chosen.centre,
                "span": [chosen.low, chosen.high],
                "trials": len(made.planned),
                "spend": made.flops,
                "reason": chosen.reason,
            }
        )
        return
    from orchestrator.summary import show_plan

    show_plan(_console(), made)
    _console().print(f"[bold]{path}[/]" + (f"\n{chosen.reason}" if chosen.reason else ""))


@app.command()
def report(
    project: ProjectPath,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page to write. Default: PROJECT/report.html"),
    ] = None,
    where: Where = None,
    params: Params = "non_embedding",
    flops_as: Flops = "exact",
    level: Level = 0.9,
) -> None:
    """Write one self-contained HTML page with figures, tables and the proposal.

    Example: `isoflop report projects/mini -o mini.html`
    """
    from analysis.study import require_laws
    from orchestrator.conclusion import write_report

    found = _evidence(project, where)
    seen = found.study(_convention(params, flops_as, level))
    require_laws(seen)
    path = output or found.project.report
    write_report(found, seen, path, found.project.proposal)
    _console().print(str(path))


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

    serve(open_project(project), port, _console())


def _run(spec: Path, directory: Path | None, as_json: bool) -> None:
    from orchestrator.planner import make_plan
    from orchestrator.project import create_project, directory_for
    from orchestrator.spec import read_spec

    made = make_plan(read_spec(spec))
    project = create_project(directory or directory_for(spec, made.name))
    from orchestrator.loop import run as run_loop

    outcome = run_loop(project, made, _console(stderr=True), started=STARTED)
    if as_json:
        _print_json(outcome.to_json())
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

    console = _console()
    if outcome.study is not None:
        show_study(console, outcome.study)
        show_files(console, outcome.project, outcome.proposal)
    if outcome.tracking_error:
        console.print(
            f"[yellow]! MLflow lacks some runs ({outcome.tracking_error}); the next run of a sweep "
            "in this project writes them"
        )
    console.print(
        f"{outcome.trained} trained now, {outcome.seconds:.0f} s, "
        f"{outcome.training_share:.0%} of it training"
    )


def _evidence(project: Path, where: list[str] | None) -> Evidence:
    from orchestrator.conclusion import evidence
    from orchestrator.project import open_project

    conditions = {}
    for item in where or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--where {item}: write COLUMN=VALUE")
        conditions[name] = value
    return evidence(open_project(project), conditions)


def _convention(params: str, flops_as: str, level: float) -> Convention:
    from orchestrator.conclusion import Convention

    return Convention(params=cast(Any, params), flops=cast(Any, flops_as), level=level)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # The stream itself, not its name: Ray's chatter is kept off by redirecting the name.
    console = Console(file=sys.stderr if stderr else sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width: do not fold tables
    return console


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{name} is {value}; it must be a positive number of FLOPs")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


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
