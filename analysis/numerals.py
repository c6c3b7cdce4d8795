"""Numbers as people write them: 100k, 1.2B, 3.2e21, 1,000,000 or 2 PF-days, read back.

`wording.count` prints them. A text that could be two numbers is refused, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

PF_DAY = 1e15 * 86_400
"""FLOPs of a petaFLOP/s for a day, the unit of compute in Kaplan et al. 2020."""

EXAMPLES = "1500000000, 1.5e9 or 1.5B"
"""Ways of writing a number, for errors."""

Mark = Literal[".", ","]
"""The sign before the decimals."""

_MULTIPLES = {
    **{"k": 3, "K": 3, "m": 6, "M": 6, "b": 9, "B": 9, "G": 9, "t": 12, "T": 12},
    **{"P": 15, "E": 18, "Z": 21, "Y": 24},
    **{"thousand": 3, "million": 6, "billion": 9, "trillion": 12},
}
"""Powers of ten. A small m is a million, as in OPT-125m: nobody has a thousandth of a parameter."""
_UNIT = re.compile(
    r"(?:(?P<multiple>[kKmMbBGtT]|(?i:thousand|million|billion|trillion))\s*)?"
    r"(?i:tokens?|params?|parameters?)?"
)
_FLOPS = re.compile(
    r"(?:(?P<multiple>[kKMBGTPEZY]|(?i:thousand|million|billion|trillion))\s*)?"
    r"(?:FLOPs?|flops?)"
)
"""Not FLOPS: in capitals it is a rate."""
_PF_DAYS = re.compile(r"(?i:pf(?:lop)?s?(?:/s)?|petaflops?(?:/s)?)[- ]?(?i:d|days?)")

_SPACES = "\u0020\u00a0\u2009\u202f"
_NUMBER = re.compile(
    r"(?a)(?P<sign>[+-]?)"
    r"(?:(?P<digits>\.?\d(?:[\d.,_'’" + _SPACES + r"]*\d)?\.?)"
    r"(?:[eE](?P<exponent>[+-]?\d{1,4})|\s*[x×*·]\s*10\^(?P<power>[+-]?\d{1,4}))?"
    r"|10\^(?P<bare>[+-]?\d{1,4}))"
    r"\s*(?P<unit>[^\W\d_].*)?"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_GROUPS = r"\d{1,3}(?:%s\d{3})"
_PLAIN = re.compile(r"\d+\.?\d*|\.\d+")
_GROUPED = re.compile(_GROUPS % f"(?P<sign>[_'’{_SPACES}])" + r"(?:(?P=sign)\d{3})*(?:[.,]\d+)?")
_UNDERSCORED = re.compile(r"\d+(?:_\d+)+(?:\.\d+)?")
_POINT = re.compile(rf"{_GROUPS % ','}{{2,}}(?:\.\d*)?|{_GROUPS % ','}\.\d+")
"""Commas that can only be thousands: two of them, or a point after them."""
_COMMA = re.compile(rf"{_GROUPS % '[.]'}{{2,}}(?:,\d*)?|{_GROUPS % '[.]'},\d+")
"""Points that can only be thousands."""
_EITHER = re.compile(r"[1-9]\d{0,2}[.,]\d{3}")
"""A thousand and some, or decimals: 1,234."""
_DECIMAL_COMMA = re.compile(r"\d+,\d+")


def read_number(text: str, mark: Mark | None = None) -> float:
    """Read a finite number, with a multiple or a unit of counts behind it.

    Parameters
    ----------
    text
        What a person wrote.
    mark
        The sign before the decimals where it is known from elsewhere; it decides what 1,234 is.

    Raises
    ------
    ValueError
        Quoting the text, if it is no number or could be two.

    Notes
    -----
    k, M, B and T are thousands to trillions, in small letters too, and G is B. Thousands are parted
    by commas, spaces, underscores or apostrophes. FLOPs take any prefix up to Y, and a PF-day is
    8.64e19 FLOPs.

    Examples
    --------
    >>> [read_number(v) for v in ("100k", "1.2B", "70b", "1,000,000", "1_000", "3.24e+12")]
    [100000.0, 1200000000.0, 70000000000.0, 1000000.0, 1000.0, 3240000000000.0]
    >>> [read_number(v) for v in ("2 PF-days", "6 ZFLOPs", "1.4T tokens", "3.2×10^21")]
    [1.728e+20, 6e+21, 1400000000000.0, 3.2e+21]
    >>> read_number("1,234")
    Traceback (most recent call last):
    ValueError: '1,234' may be 1234 or 1.234: write the one or the other
    >>> read_number("1,234", mark=".")
    1234.0
    """
    parts = _NUMBER.fullmatch(_simplified(text))
    if parts is None:
        raise _unreadable(text)
    digits = "1" if parts["bare"] else _digits(parts["digits"], mark, text)
    power = int(parts["exponent"] or parts["power"] or parts["bare"] or 0)
    scientific = any(parts[name] for name in ("exponent", "power", "bare"))
    more, factor = _unit(parts["unit"] or "", scientific=scientific, text=text)
    value = float(f"{parts['sign']}{digits}e{power + more}") * factor
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is larger than any number here may be")
    return value


def decimal_mark(texts: Iterable[str]) -> Mark | None:
    """The sign before the decimals in numbers of one hand, None where they do not say or disagree.

    Examples
    --------
    >>> decimal_mark(["1,234", "1,5"]), decimal_mark(["1,234", "1,234,567"])
    (',', '.')
    >>> decimal_mark(["1,234"]), decimal_mark(["1,5", "1.5"])
    (None, None)
    """
    marks: set[Mark] = set()
    for text in texts:
        parts = _NUMBER.fullmatch(_simplified(text))
        digits = (parts["digits"] if parts else None) or ""
        if _EITHER.fullmatch(digits):
            continue
        if _COMMA.fullmatch(digits) or _DECIMAL_COMMA.fullmatch(digits):
            marks.add(",")
        elif "." in digits or _POINT.fullmatch(digits):
            marks.add(".")
    return marks.pop() if len(marks) == 1 else None


def _simplified(text: str) -> str:
    """A text with powers as ^ and signs as on a keyboard."""
    text = text.strip().replace("−", "-").replace("**", "^").replace("^{", "^").replace("}", "")
    powers = re.sub("10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", lambda found: f"10^{found[1]}", text)
    return powers.translate(_SUPERSCRIPTS)


def _digits(digits: str, mark: Mark | None, text: str) -> str:
    """The digits as Python reads them: a point before the decimals and nothing else."""
    if _EITHER.fullmatch(digits) and ("," in digits or mark == ","):
        if mark is None:
            plain = text.replace(digits, digits.replace(",", ""))
            decimals = text.replace(digits, digits.replace(",", "."))
            raise ValueError(f"{text!r} may be {plain} or {decimals}: write the one or the other")
        return _parted(digits, mark)
    if _PLAIN.fullmatch(digits) or _UNDERSCORED.fullmatch(digits):
        return digits.replace("_", "")
    if _GROUPED.fullmatch(digits):
        return re.sub(rf"[_'’{_SPACES}]", "", digits).replace(",", ".")
    if _POINT.fullmatch(digits):
        return _parted(digits, ".")
    if _COMMA.fullmatch(digits) or _DECIMAL_COMMA.fullmatch(digits):
        return _parted(digits, ",")
    raise _unreadable(text)


def _parted(digits: str, mark: Mark) -> str:
    thousands = "," if mark == "." else "."
    return digits.replace(thousands, "").replace(mark, ".")


def _unit(unit: str, *, scientific: bool, text: str) -> tuple[int, float]:
    """Power of ten and factor of what stands behind a number."""
    if _PF_DAYS.fullmatch(unit):
        return 0, PF_DAY
    parts = _FLOPS.fullmatch(unit)
    if parts is None:
        parts = _UNIT.fullmatch(unit)
        # "1e3k" is more likely a slip than a million.
        if parts is None or (scientific and parts["multiple"]):
            raise _unreadable(text)
    multiple = parts["multiple"] or ""
    return _MULTIPLES.get(multiple.lower() if len(multiple) > 1 else multiple, 0), 1.0


def _unreadable(text: str) -> ValueError:
    return ValueError(f"{text!r} is not a number: write one such as {EXAMPLES}")
