"""The verb that tunes a recipe: tune. Thin, as `cli.py` is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.options import (
    INTERRUPTED,
    Address,
    Json,
    ProjectOption,
    Told,
    console,
    number,
    print_json,
    require_positive,
    say,
)


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verb."""
    app.command()(tune)


def tune(
    spec: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")],
    project: ProjectOption = None,
    sizes: Annotated[int, typer.Option("--sizes", help="Sizes of the sweep to tune.")] = 3,
    trials: Annotated[
        int, typer.Option("--trials", help="Probes of a size, at most; 9 do where the recipe is.")
    ] = 18,
    tokens_per_param: Annotated[
        list[float] | None,
        typer.Option(
            "--tokens-per-param",
            parser=number("--tokens-per-param"),
            metavar="D/N",
            help="At which each size is tuned; repeatable. Default: the sweep's.",
        ),
    ] = None,
    spend: Annotated[
        float | None,
        typer.Option(
            "--spend",
            parser=number("--spend"),
            metavar="FLOPS",
            help="FLOPs of all probes, at most. Default: a quarter of the sweep's.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="The sweep file to write. Default: SWEEP-tuned.toml beside it."
        ),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Probe rates and batches at a few sizes of a sweep, and fit its recipe's constants.

    Example: `isoflop tune sweep.toml --sizes 3`
    """
    from analysis.errors import InputError
    from orchestrator.connection import check, prepare
    from orchestrator.project import create_project, directory_for
    from orchestrator.spec import rooted, spec_as_written
    from orchestrator.storage import is_uri
    from orchestrator.tune import Asked
    from orchestrator.tune import tune as tune_recipe
    from orchestrator.tune_view import show_models, show_tuned, tuned_json

    require_positive("--spend", spend)
    asked = Asked(sizes=sizes, trials=trials, ratios=tuple(tokens_per_param or ()), spend=spend)
    prepare(address)
    if address is not None:
        check(address)
    written = spec_as_written(spec)
    read = rooted(written, spec)
    to = output or str(spec.with_name(f"{spec.stem}-tuned.toml"))
    if not is_uri(to) and Path(to).resolve() == spec.resolve():
        raise InputError(f"--output {to} is the sweep that is to be tuned: name another file")
    found = tune_recipe(
        create_project(project or directory_for(spec, read.name)),
        read,
        asked,
        console(stderr=True),
        output=to,
        as_written=written if _beside(to, spec) else None,
        address=address,
    )
    if as_json:
        print_json(tuned_json(found))
    elif found.made is not None:
        show_tuned(console(), found, found.made, asked.level)
    elif found.found:
        show_models(console(), found.plan.spec.name, found.found, asked.level)
    if not found.finished:
        say(found.shortfall)
        raise Told(INTERRUPTED if found.end.interrupted else 2 if found.refusal else 1)


def _beside(output: str, spec: Path) -> bool:
    """Whether paths that are relative to the one sweep file are to the other one, too."""
    from orchestrator.storage import is_uri

    return not is_uri(output) and Path(output).resolve().parent == spec.resolve().parent
