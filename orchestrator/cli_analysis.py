"""The verbs that say what observations mean: fit, forecast, diagnose, propose, report.

Thin: each opens its source, calls one function and prints what that gave. Nothing heavy is imported
before a verb needs it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.grouped import grouped
from orchestrator.options import (
    Checking,
    Data,
    Fitting,
    Flops,
    FlopsAs,
    Json,
    Params,
    ParamsAs,
    Price,
    Rows,
    console,
    number,
    print_json,
    require_positive,
)

SweepFile = Annotated[
    str | None,
    typer.Option("-o", "--output", help="The sweep file to write. Default: PROJECT/next.toml"),
]
Page = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", help="The page to write. Default: PROJECT/report.html, or report.html"
    ),
]


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verbs, in the order of its help."""
    for verb in (fit, forecast, diagnose, propose, report):
        app.command()(grouped(verb))


def fit(
    data: Data,
    rows: Rows,
    fitting: Fitting,
    checking: Checking,
    params: Params = None,
    flops_as: Flops = None,
    conventions: Annotated[
        bool,
        typer.Option("--conventions", help="The same data under every convention, in one table."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit the laws to everything that a source holds.

    Example: `isoflop fit points.csv --columns params="Model Size",flops="Training FLOP"`
    """
    from analysis.study import require_laws
    from analysis.study_json import to_json

    found = data.open(rows)
    if conventions:
        from orchestrator.conventions import compare, conventions_json, show_conventions

        compared = compare(found, level=fitting.level, method=fitting.method())
        if as_json:
            print_json(conventions_json(compared))
        else:
            show_conventions(console(), compared)
        return
    seen = checking.study(found, fitting.convention(params, flops_as), fitting)
    require_laws(seen)
    if as_json:
        print_json(to_json(seen))
        return
    from orchestrator.summary import show_study

    show_study(console(), seen)


def forecast(
    data: Data,
    rows: Rows,
    fitting: Fitting,
    price: Price,
    flops: Annotated[
        float | None,
        typer.Option(
            "--flops",
            parser=number("--flops"),
            metavar="C",
            help="The compute budget, in FLOPs, or as 2PFd.",
        ),
    ] = None,
    at_params: Annotated[
        float | None,
        typer.Option(
            "--at-params",
            parser=number("--at-params"),
            metavar="N",
            help="Instead: the C at which N is optimal.",
        ),
    ] = None,
    at_tokens: Annotated[
        float | None,
        typer.Option(
            "--at-tokens",
            parser=number("--at-tokens"),
            metavar="D",
            help="Instead: the C at which D is optimal.",
        ),
    ] = None,
    served_tokens: Annotated[
        float | None,
        typer.Option(
            "--served-tokens",
            parser=number("--served-tokens"),
            metavar="T",
            help="C serves T tokens too: 6ND + 2NT.",
        ),
    ] = None,
    params: Params = None,
    flops_as: FlopsAs = None,
    as_json: Json = False,
) -> None:
    """Say how large a model to train on how many tokens at a budget, and the loss to expect.

    Example: `isoflop forecast projects/mini --flops 1e13`
    """
    from orchestrator.outlook import outlook, outlook_json, show_outlook

    require_positive("--flops", flops)
    found = outlook(
        data.open(rows).observed(fitting.convention(params, flops_as), fitting.method()),
        fitting.method(),
        fitting.level,
        flops=flops,
        params=at_params,
        tokens=at_tokens,
        served_tokens=served_tokens,
        rate=price.rate(),
    )
    if as_json:
        print_json(outlook_json(found))
    else:
        show_outlook(console(), found)


def diagnose(
    data: Data,
    rows: Rows,
    fitting: Fitting,
    price: Price,
    params: Annotated[
        float,
        typer.Option("--params", parser=number("--params"), metavar="N", help="Its parameters."),
    ],
    tokens: Annotated[
        float,
        typer.Option(
            "--tokens", parser=number("--tokens"), metavar="D", help="Its training tokens."
        ),
    ],
    params_as: ParamsAs = None,
    flops_as: Flops = None,
    as_json: Json = False,
) -> None:
    """Say whether a run of N parameters on D tokens is compute-optimal, and by how much not.

    SOURCE may be a published law too, such as hoffmann-2022 or besiroglu-2024.

    Example: `isoflop diagnose besiroglu-2024 --params 280e9 --tokens 300e9`
    """
    from analysis import diagnosis
    from analysis.laws import PUBLISHED
    from orchestrator.verdict import diagnose_observed, show_diagnosis

    notes: tuple[str, ...] = ()
    is_name = re.fullmatch(r"[\w-]+", data.source) and not Path(data.source).exists()
    if data.source in PUBLISHED or is_name:
        basis = diagnosis.published_basis(data.source)
        found = [diagnosis.diagnose(basis, params, tokens, fitting.level)]
    else:
        observed = data.open(rows).observed(
            fitting.convention(params_as, flops_as), fitting.method()
        )
        found, notes = diagnose_observed(observed, fitting.method(), fitting.level, params, tokens)
    if as_json:
        print_json(diagnosis.diagnosis_json(found, price.rate(), notes))
    else:
        show_diagnosis(console(), found, price.rate(), notes)


def propose(
    data: Data,
    rows: Rows,
    flops: Annotated[
        float | None,
        typer.Option(
            "--flops",
            parser=number("--flops"),
            metavar="C",
            help="FLOPs of each trial. Default: the next budget.",
        ),
    ] = None,
    spend: Annotated[
        float | None,
        typer.Option(
            "--spend",
            parser=number("--spend"),
            metavar="FLOPS",
            help="FLOPs of all trials together, at most.",
        ),
    ] = None,
    sizes: Annotated[int, typer.Option("--sizes", help="Model sizes.")] = 7,
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep",
            metavar="SWEEP.toml",
            help="The sweep file that was run, where its recipe is your own: that is imported.",
        ),
    ] = None,
    output: SweepFile = None,
    as_json: Json = False,
) -> None:
    """Write the next sweep: sizes around the forecast, spanning its uncertainty.

    Example: `isoflop propose projects/mini --spend 2e13`
    """
    from orchestrator.conclusion import propose_next
    from orchestrator.spec import code_of, read_spec

    require_positive("--flops", flops)
    require_positive("--spend", spend)
    named = None if sweep is None else read_spec(sweep)
    found = data.open(rows)
    path = output or (found.project.proposal if found.project else "next.toml")
    chosen, made = propose_next(
        found, output=path, flops=flops, spend=spend, sizes=sizes, sweep=named
    )
    for phrase in code_of(made.spec):
        text = f"! a run of {path} executes {phrase}: read it first if the project is not yours"
        console(stderr=True).print(text, style="yellow", markup=False)
    if as_json:
        print_json(
            {
                "proposal": path,
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
    from orchestrator.estimate import estimate
    from orchestrator.plan_view import show_plan

    show_plan(console(), estimate(made))
    console().print(path, style="bold")
    if chosen.reason:
        console().print(chosen.reason)


def report(
    data: Data,
    rows: Rows,
    fitting: Fitting,
    checking: Checking,
    params: Params = None,
    flops_as: Flops = None,
    output: Page = None,
) -> None:
    """Write one self-contained HTML page with figures, tables and the proposal.

    Example: `isoflop report projects/mini -o mini.html`
    """
    from analysis.study import require_laws
    from orchestrator.conclusion import write_pictures, write_report

    found = data.open(rows)
    seen = checking.study(found, fitting.convention(params, flops_as), fitting)
    require_laws(seen)
    project = found.project
    if project is None:
        path = output or "report.html"
        write_report(found, seen, path, None)
    else:
        path = output or project.report
        with project.drafts() as drafts:
            text = project.proposal_text()
            figures = write_report(found, seen, output or drafts.report, text)
            write_pictures(figures, drafts.figures)
    console().print(path)
