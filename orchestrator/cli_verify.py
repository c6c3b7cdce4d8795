"""The verb that compares a project's files with each other: verify. Thin, as `cli.py` is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from analysis.wording import plural
from orchestrator.options import Json, ProjectPath, Told, console, print_json

if TYPE_CHECKING:
    from orchestrator.verify import Verified

SHOWN = 50
"""Problems that a person is shown; JSON has all."""
MANY = 500
"""Rows from which on it is shown how far it is."""


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verb."""
    app.command()(verify)


def verify(project: ProjectPath, as_json: Json = False) -> None:
    """Check that a project's files agree with each other and point to nothing outside of it.

    Nothing is run, imported or changed. The exit code is 1 if something disagrees.

    Example: `isoflop verify s3://bucket/runs`
    """
    from rich.progress import Progress

    from orchestrator.project import open_project
    from orchestrator.verify import verify as check

    opened = open_project(project)
    errors = console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("rows", visible=False)
        result = check(
            opened,
            lambda done, all_: bar.update(task, completed=done, total=all_, visible=all_ >= MANY),
        )
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)
    if result.problems:
        raise Told(1)


def _show(result: Verified) -> None:
    out = console()
    parts = [plural(result.rows, "row"), f"{result.rows_checked} compared with their trials"]
    parts += [f"{result.copied} with their copies"] if result.copied else []
    parts += [plural(result.models, "model")] if result.models else []
    out.print(f"{result.project}: {', '.join(parts)}", markup=False, highlight=False)
    for note in result.notes:
        out.print(f"! {note}", markup=False, highlight=False, style="yellow")
    for problem in result.problems[:SHOWN]:
        out.print(f"disagrees: {problem.reason}", markup=False, highlight=False)
    if len(result.problems) > SHOWN:
        out.print(f"… {SHOWN} of {len(result.problems)}; --json has all", style="dim")
    if not result.problems:
        out.print("nothing disagrees, and nothing points outside of the project")
