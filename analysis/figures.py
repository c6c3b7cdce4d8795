"""Every plot. Drawn with matplotlib's object interface: no pyplot, no global state, no display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.errors import InputError
from analysis.fitting import Fit
from analysis.laws import GENERALISED, HOFFMANN, loss
from analysis.observations import FloatArray, Observations
from analysis.optimum import optimum
from analysis.pair import RECENT_BUDGETS
from analysis.study import Study
from analysis.wording import CONVENTIONS, SUFFIXES
from analysis.writing import replacing

INK, GRID = "#1f2430", "#e4e6eb"
FAR = 1e3
"""Times what was measured: a law that is not identified may put N_opt anywhere beyond it."""
LAW_COLOURS = {"hoffmann": "#c2410c", "generalised": "#1d4ed8", "kaplan": "#7c8594"}


def draw(found: Study) -> dict[str, Figure]:
    """Draw all figures of a study, by name.

    Valleys need budgets, and rows of no budget are drawn beside each other; without a law there is
    nothing that scales.
    """
    of_budget = np.isfinite(found.obs.budget)
    drawn = {"isoflop": isoflop_figure(found)} if of_budget.any() else {}
    if not of_budget.all():
        drawn["losses"] = law_figure(found)
    return {**drawn, "scaling": scaling_figure(found)} if found.fits else drawn


def save(figures: dict[str, Figure], directory: Path) -> list[Path]:
    """Write each figure as PNG and SVG; return the PNG paths.

    Raises
    ------
    InputError
        If the directory is a symbolic link, which somebody may have planted.
    """
    if directory.is_symlink():
        raise InputError(
            f"{directory} is a symbolic link to {directory.resolve()}: remove it, so that figures "
            "are written into a directory of their own"
        )
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        with replacing(directory / f"{name}.svg") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        paths.append(directory / f"{name}.png")
        with replacing(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=160)
    return paths


def svg(figure: Figure) -> str:
    """The figure as an SVG element, to stand inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def isoflop_figure(found: Study) -> Figure:
    """Loss by size at each budget: points, the generalised law, and each valley's bottom."""
    figure, (axes,) = _canvas(1, 7.4, 4.8)
    obs = found.obs
    budgets = obs.budgets()
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(budgets)))
    law = {item.law.name: item for item in found.fits}
    shown = law.get(GENERALISED.name) or law.get(HOFFMANN.name)
    for budget, shade, vertex in zip(budgets, shades, found.isoflop.vertices, strict=True):
        rows = obs.select(obs.budget == budget)
        axes.plot(rows.params, rows.loss, "o", ms=5, color=shade, label=f"{vertex.flops:.3g}")
        if shown is not None:
            axes.plot(*_along(rows, shown, found), "-", lw=1.2, color=shade)
        if vertex.params is not None and vertex.loss is not None:
            filled = shade if vertex.status == "interior" else "none"
            axes.plot(vertex.params, vertex.loss, "*", ms=14, mec="white", mew=0.8, mfc=filled)
    axes.set_xscale("log")
    _counted(axes.xaxis)
    axes.set_xlabel(f"N, {CONVENTIONS[obs.params_convention]}")
    axes.set_ylabel(f"L, held-out loss, {_plain(obs.loss_unit)}")
    axes.legend(title=f"C, {CONVENTIONS[obs.flops_convention]}", frameon=False, fontsize=9)
    lines = f"lines: {shown.law.name} law fitted to all points; " if shown else ""
    _title(axes, "IsoFLOP valleys", f"{lines}stars: parabola minima")
    return figure


def law_figure(found: Study) -> Figure:
    """Losses of all rows by compute and size, and what laws leave of them."""
    figure, (left, right) = _canvas(2, 10.4, 4.6)
    obs = found.obs
    shades = LogNorm(float(obs.params.min()), float(obs.params.max()))
    order = np.argsort(obs.params)
    drawn = left.scatter(
        obs.flops[order], obs.loss[order], c=obs.params[order], s=16, norm=shades, cmap="viridis"
    )
    bar = figure.colorbar(drawn, ax=left, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(f"N, {CONVENTIONS[obs.params_convention]}")
    _counted(bar.ax.yaxis)
    grid = np.geomspace(obs.flops.min(), obs.flops.max() * 1.6, 80)
    for item in found.fits[:2]:
        best = _near([optimum(item.theta, float(c), found.cost).loss for c in grid], obs.loss)
        fitted = loss(item.theta, obs.params, obs.tokens)
        colour, label = LAW_COLOURS[item.law.name], f"{item.law.name} law"
        left.plot(grid, best, color=colour, lw=1.6, label=f"lowest by the {label}")
        above = 100.0 * np.log(obs.loss / fitted)
        right.plot(fitted, above, "o", ms=4, alpha=0.7, mew=0, color=colour, label=label)
    left.set_xscale("log")
    left.set_xlabel(f"C, {CONVENTIONS[obs.flops_convention]}")
    left.set_ylabel(f"L, held-out loss, {_plain(obs.loss_unit)}")
    right.axhline(0.0, color=INK, lw=0.8)
    right.set_xlabel(f"L by the law, {_plain(obs.loss_unit)}")
    right.set_ylabel("measured above fitted loss, %")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    some = len(obs.budgets()) > 0
    budgets = "all rows, also those of no budget" if some else "no budgets: no valleys to draw"
    _title(left, "Loss by compute and size", budgets)
    _title(right, "Residuals", "")
    return figure


def scaling_figure(found: Study) -> Figure:
    """N_opt and L by budget: minima, both laws, and the forecast at the next budget."""
    figure, (left, right) = _canvas(2, 10.4, 4.4)
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
    obs = found.obs
    _minima(found, left, right)
    high = (found.next.flops if found.next else found.top_flops) * 1.6
    grid = np.geomspace(obs.flops.min() / 1.6, high, 80)
    for item in found.next.recent.fits if found.next else found.fits:
        label = f"{item.law.name} law"
        label += f", last {RECENT_BUDGETS} budgets" if item.n < len(obs) else ""
        n = _near([optimum(item.theta, float(c), found.cost).params for c in grid], obs.params)
        left.plot(grid, n, color=LAW_COLOURS[item.law.name], lw=1.6, label=label)
    for item in found.next.all.fits if found.next else found.fits:
        best = _near([optimum(item.theta, float(c), found.cost).loss for c in grid], obs.loss)
        label = f"{item.law.name} law"
        right.plot(grid, best, color=LAW_COLOURS[item.law.name], lw=1.6, label=label)
    if found.next:
        measured = ((left, found.next.params, obs.params), (right, found.next.loss, obs.loss))
        for axes, part, values in measured:
            if np.isnan(_near([part.estimate], values)).any():
                continue
            ends = np.clip([part.low, part.high], part.estimate / 30, part.estimate * 30)
            axes.plot([found.next.flops] * 2, ends, "-", lw=5, color="#f59e0b", alpha=0.55)
            axes.plot(
                found.next.flops, part.estimate, "D", ms=7, color="#b45309",
                label=f"forecast, {found.level:.0%}",
            )  # fmt: skip
    _counted(left.yaxis)
    for axes in (left, right):
        axes.set_xlabel(f"C, {CONVENTIONS[obs.flops_convention]}")
        axes.legend(frameon=False, fontsize=9)
    left.set_ylabel(f"N_opt, {CONVENTIONS[obs.params_convention]}")
    right.set_ylabel(f"L at the optimum, {_plain(obs.loss_unit)}")
    planned = (
        "minima: at equal exact FLOPs, not equal 6ND"
        if obs.flops_convention == "6nd"
        and found.isoflop.interior
        and any(v.flops != v.budget for v in found.isoflop.interior)
        else ""
    )
    _title(left, "Compute-optimal size", planned)
    _title(right, "Compute-optimal loss", "")
    return figure


def _minima(found: Study, left: Axes, right: Axes) -> None:
    """The bottoms of the budgets' parabolas, N with its interval."""
    usable = found.isoflop.interior
    if not usable:
        return
    c = np.array([v.flops for v in usable])
    n = np.array([v.params or np.nan for v in usable])
    bars = [v.params_interval(found.level) for v in usable]
    low = np.array([i.low if i else x for i, x in zip(bars, n, strict=True)])
    high = np.array([i.high if i else x for i, x in zip(bars, n, strict=True)])
    spread = np.array([n - np.maximum(low, n / 30), np.minimum(high, n * 30) - n])
    minima = f"IsoFLOP minima, {found.level:.0%}"
    left.errorbar(c, n, yerr=spread, fmt="o", ms=6, color=INK, capsize=3, label=minima)
    right.plot(c, [v.loss or np.nan for v in usable], "o", ms=6, color=INK, label="IsoFLOP minima")


def _along(rows: Observations, item: Fit, found: Study) -> tuple[FloatArray, FloatArray]:
    """N, and the law's L where the budget has its trials; each of shape (120,)."""
    if rows.flops_convention != "6nd":
        n = np.geomspace(rows.params.min() / 1.3, rows.params.max() * 1.3, 120)
        middle = np.mean(np.log(rows.flops))  # rows of a budget that was found differ in C
        d = np.exp(middle - found.cost.log_and_slope(np.log(n))[0])
    else:  # 6ND differs along the budget, and D beyond its sizes is not known here
        n = np.geomspace(rows.params.min(), rows.params.max(), 120)
        order = np.argsort(rows.params)
        d = np.exp(np.interp(np.log(n), np.log(rows.params[order]), np.log(rows.tokens[order])))
    return n, loss(item.theta, n, d)


def _near(values: Sequence[float], measured: FloatArray) -> FloatArray:
    """Values that are within a thousandfold of measured ones, else NaN, which is not drawn.

    Beyond what a double holds even the margin of an axis overflows.
    """
    array = np.asarray(values, dtype=np.float64)
    near = (array >= measured.min() / FAR) & (array <= measured.max() * FAR)
    return np.where(near, array, np.nan)


def _plain(text: str) -> str:
    """Text of others as it is: no formula, and boxes for signs that the font does not have."""
    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in text).replace("$", r"\$")


def _canvas(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for item in axes:
        item.grid(True, color=GRID, lw=0.8)
        item.set_axisbelow(True)
        item.spines[["top", "right"]].set_visible(False)
        item.spines[["left", "bottom"]].set_color("#9aa1ad")
        item.tick_params(colors=INK, which="both", labelsize=9)
    return figure, axes


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=18)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#667085")


def _counted(axis: Axis) -> None:
    """Parameters as people write them: 20k, 1.5M; labels also between decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for unit, suffix in SUFFIXES:
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
