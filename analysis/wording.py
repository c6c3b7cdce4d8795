"""Numbers, counts and commands as people read and paste them, in terminals, reports and figures."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from analysis.discrepancy import Discrepancy, Shares
    from analysis.intervals import Interval

CONVENTIONS = {
    "non_embedding": "non-embedding parameters",
    "matmul": "parameters with the output head",
    "total": "total parameters",
    "exact": "exact FLOPs",
    "6nd": "FLOPs by 6ND",
    "given": "as its source counts",
    "derived": "C/(6D)",
}

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """A number of parameters or tokens, three digits.

    Examples
    --------
    >>> [count(v) for v in (13824, 70e9, 288768, 999.6, 12, None)]
    ['13.8k', '70.0B', '289k', '1.00k', '12', '–']
    >>> count(2e16)
    '2e+16'
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 0.9995e15:
        return f"{value:.3g}"
    for unit, suffix in SUFFIXES:
        if value >= 0.9995 * unit:
            return f"{float(f'{value / unit:.3g}'):#.3g}".rstrip(".") + suffix
    return f"{value:.3g}"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """A number with its noun; `many` where the plural is not the noun and an s.

    Examples
    --------
    >>> plural(1, "row"), plural(2, "row"), plural(0, "entry", "entries")
    ('1 row', '2 rows', '0 entries')
    """
    return f"{number} {noun if number == 1 else many or noun + 's'}"


def written(value: object) -> str:
    """A value as a person would write it, so that it is read back as the same one.

    Examples
    --------
    >>> [written(v) for v in (3e-4, 64.0, 1e18, 7, True, "8 GPUs")]
    ['0.0003', '64', '1e+18', '7', 'true', '8 GPUs']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def where_option(column: str, value: object) -> str:
    """The option that selects the rows with a value, quoted for a shell.

    Examples
    --------
    >>> where_option("lr", 3e-4), where_option("notes", "8 GPUs")
    ('--where lr=0.0003', "--where 'notes=8 GPUs'")
    """
    return f"--where {shlex.quote(f'{column}={written(value)}')}"


def span(part: Interval | None, style: Literal["count", "plain"] = "count") -> str:
    """The ends of an interval; an open one as ∞ or 0.

    Examples
    --------
    >>> from analysis.intervals import Interval
    >>> span(Interval(2.0, 1.5, 1e40, 0.9), "plain")
    '1.500 to 1e+40'
    """
    if part is None:
        return "–"
    show = count if style == "count" else _plain
    low = show(part.low) if part.low > 0 or style != "count" else "0"
    high = show(part.high) if math.isfinite(part.high) else "∞"
    return f"{low} to {high}" if math.isfinite(part.low) else f"−∞ to {high}"


def _plain(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(log_ratio: float | None) -> str:
    """A difference of logarithms as a signed percentage.

    Examples
    --------
    >>> percent(0.01), percent(-0.0083), percent(None)
    ('+1.0%', '−0.8%', '–')
    """
    if log_ratio is None:
        return "–"
    return f"{100 * math.expm1(log_ratio):+.1f}%".replace("-", "−")


class MadeOf(Protocol):
    """A forecast that knows what its intervals are made of."""

    @property
    def noise(self) -> Shares | None:
        """Standard deviations of ln N_opt and ln L due to noise."""

    @property
    def by_law(self) -> Shares | None:
        """Standard deviations of ln N_opt and ln L due to the law's error."""

    @property
    def discrepancy(self) -> Discrepancy | None:
        """The discrepancy from which `by_law` is computed."""


def made_of(ahead: MadeOf) -> str:
    """Describe the standard deviations of ln N_opt and ln L by their two sources."""
    noise, by_law, source = ahead.noise, ahead.by_law, ahead.discrepancy
    if noise is None or by_law is None or source is None:
        return ""
    tests = plural(source.back_tests, "back-test")
    why = "default" if source.source == "default" else f"by {tests}"
    return (
        f"standard deviations of ln N_opt: noise {share(noise.params)}, law "
        f"{share(by_law.params)}; of ln L: noise {share(noise.loss)}, law {share(by_law.loss)} "
        f"(law: {why})"
    )


def share(value: float) -> str:
    """A standard deviation of a logarithm, two digits.

    Examples
    --------
    >>> [share(v) for v in (0.0412, 0.00213, 0.0, 1.25, math.inf)]
    ['.041', '.0021', '0', '1.2', '∞']
    """
    if math.isinf(value):
        return "∞"
    return f"{value:.2g}".removeprefix("0") or "0"


def held(inside: bool | None) -> str:
    """Whether a measurement fell into its interval, in a word; nothing where there is none."""
    return {True: "held", False: "missed", None: ""}[inside]


def figures_of(value: float, digits: int = 4) -> str:
    """A constant, to some digits, without an exponent where that is short.

    Examples
    --------
    >>> [figures_of(v) for v in (0.34731, 1390.2, 5.488e10, math.inf)]
    ['0.3473', '1390', '5.488e+10', '∞']
    >>> figures_of(1394.2, 3)
    '1390'
    """
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if 1e3 <= abs(rounded) < 1e5 else f"{rounded:.{digits}g}"
