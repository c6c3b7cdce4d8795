"""One self-contained HTML page of a study: no scripts, no network, pictures inside."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.figures import svg
from analysis.intervals import constant_intervals
from analysis.study import Study
from analysis.wording import CONVENTIONS, count, percent, span


def page(
    found: Study,
    figures: dict[str, Figure],
    *,
    table: pa.Table,
    name: str,
    proposal: str | None,
) -> str:
    """The report.

    Parameters
    ----------
    found
        What to report.
    figures
        Its figures, by name.
    table
        The observations behind it, all statuses, with `SCHEMA`'s columns.
    name
        The sweep's name.
    proposal
        Text of the proposed sweep file, if there is one.
    """
    environment = Environment(
        loader=PackageLoader("analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"count": count, "span": span, "percent": percent})
    rows: list[dict[str, Any]] = table.drop_columns(["curve"]).sort_by("flops_exact").to_pylist()
    return environment.get_template("report.html.j2").render(
        study=found,
        name=name,
        figures={key: Markup(svg(figure)) for key, figure in figures.items()},
        constants=[(item, constant_intervals(item, found.level)) for item in found.fits],
        rows=rows,
        proposal=proposal,
        params=CONVENTIONS[found.obs.params_convention],
        flops=CONVENTIONS[found.obs.flops_convention],
        total_flops=sum(row["flops_spent"] for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )
