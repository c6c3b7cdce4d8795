"""One self-contained HTML page of a study: no scripts, no network, pictures inside."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.figures import svg
from analysis.heldout import HEADLINE, median_error
from analysis.study import Study
from analysis.wording import CONVENTIONS, count, figures_of, held, made_of, percent, span


def page(
    found: Study,
    figures: dict[str, Figure],
    *,
    table: pa.Table | None,
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
        The observations behind it, all statuses, with `SCHEMA`'s columns; None where they are
        somebody else's, who has other columns.
    name
        Of the sweep or the source.
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
    environment.filters.update(
        {
            "count": count,
            "span": span,
            "percent": percent,
            "figures": figures_of,
            "held": held,
            "shares": made_of,
        }
    )
    rows = _rows(table)
    return environment.get_template("report.html.j2").render(
        study=found,
        name=name,
        figures={key: Markup(svg(figure)) for key, figure in figures.items()},
        constants=[
            (item, known.constants) for item, known in zip(found.fits, found.intervals, strict=True)
        ],
        rows=rows,
        proposal=proposal,
        left_out=[
            median_error(found.left_out, HEADLINE, part) for part in ("loss_error", "params_error")
        ],
        params=CONVENTIONS[found.obs.params_convention],
        flops=CONVENTIONS[found.obs.flops_convention],
        total_flops=sum(row["flops_spent"] or 0.0 for row in rows) or found.obs.flops.sum(),
        seconds=sum(row["seconds"] or 0.0 for row in rows),
    )


def _rows(table: pa.Table | None) -> list[dict[str, Any]]:
    """Rows by exact FLOPs; of somebody else's, whose training is not known here, none."""
    if table is None:
        return []
    rows: list[dict[str, Any]] = table.drop_columns(["curve"]).sort_by("flops_exact").to_pylist()
    return rows
