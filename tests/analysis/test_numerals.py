"""Numbers are read as they are printed; what could be two numbers is refused."""

import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.numerals import PF_DAY, decimal_mark, read_number
from analysis.wording import count, figures_of, written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7.0),
        ("-1", -1.0),
        ("+2.5", 2.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("007", 7.0),
        ("3e-4", 3e-4),
        ("1E9", 1e9),
        ("3.24e+12", 3.24e12),
        ("100k", 1e5),
        ("100K", 1e5),
        ("125m", 1.25e8),
        ("1.5 M", 1.5e6),
        ("1.2B", 1.2e9),
        ("70b", 7e10),
        ("3G", 3e9),
        ("1T", 1e12),
        ("1.1k", 1100.0),
        ("1.4T tokens", 1.4e12),
        ("7B params", 7e9),
        ("1 million", 1e6),
        ("2.5 billion parameters", 2.5e9),
        ("15 Trillion tokens", 1.5e13),
        ("1_000_000", 1e6),
        ("12_34", 1234.0),
        ("1,000,000", 1e6),
        ("1,234.5", 1234.5),
        ("1 000 000", 1e6),
        ("1\u202f000", 1000.0),
        ("1'000'000", 1e6),
        ("1.234.567", 1234567.0),
        ("1.234,5", 1234.5),
        ("3,5", 3.5),
        ("3,24e12", 3.24e12),
        ("0,125", 0.125),
        ("2PFd", 2 * 8.64e19),
        ("2 PF-days", 2 * 8.64e19),
        ("1 PF-day", 8.64e19),
        ("3640 PFLOP/s-days", 3640 * 8.64e19),
        ("1e3 petaflop/s-days", 8.64e22),
        ("5.76e23 FLOPs", 5.76e23),
        ("1 FLOP", 1.0),
        ("3e3 PFLOPs", 3e18),
        ("6 ZFLOPs", 6e21),
        ("2 billion FLOPs", 2e9),
        ("3.2×10^21", 3.2e21),
        ("3.2 x 10^{21}", 3.2e21),
        ("3.2·10²¹", 3.2e21),
        ("10^9", 1e9),
        ("10**9", 1e9),
        ("−3", -3.0),
        (" 7 ", 7.0),
    ],
)
def test_numbers_are_read(text: str, value: float) -> None:
    assert read_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "abc",
            "nan",
            "inf",
            "1e400",
            "0x10",
            "1e",
            "e9",
            "1.2.3",
            "1,2,3",
            "--1",
            "1-2",
        ),
        *("8x7B", "1e3k", "12 GB", "3 TFLOPS", "3 TFLOP/s", "1/3", "50%", "1 2", "1,00,000", "5 P"),
        *("1.2 B C", "12,34,56", "1_", "_1", "1,", ",5,", "1\n2", "٣"),
    ],
)
def test_what_is_no_number_is_quoted_back(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a number|larger than any") as error:
        read_number(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["1,234", "12,345", "999,999", "-1,234", "1,234B", "1,234e3"])
def test_a_comma_that_may_be_two_things_is_refused(text: str) -> None:
    either = f"{text!r} may be {text.replace(',', '')} or {text.replace(',', '.')}: write"
    with pytest.raises(ValueError, match=re.escape(either)):
        read_number(text)
    assert read_number(text, ".") == 1000 * read_number(text, ",")


def test_a_column_shows_what_its_commas_are() -> None:
    assert decimal_mark(["1,234", "7", "1,234,567"]) == "."
    assert decimal_mark(["1,234", "2.5"]) == "."
    assert decimal_mark(["1,234", "2,5"]) == ","
    assert decimal_mark(["1.234", "1.234.567"]) == ","
    assert decimal_mark(["2,5", "2.5"]) is None
    assert decimal_mark(["1,234", "1.234", "x", "7"]) is None


def test_a_petaflop_per_second_day_is_what_it_says() -> None:
    assert PF_DAY == 1e15 * 24 * 60 * 60 == 8.64e19


@given(st.floats(min_value=1e-3, max_value=1e15))
def test_what_tables_print_is_read_back(value: float) -> None:
    assert read_number(count(value)) == pytest.approx(value, rel=5.1e-3)
    assert read_number(figures_of(value)) == pytest.approx(value, rel=5.1e-4)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53))
def test_what_is_suggested_is_read_back_exactly(value: float) -> None:
    assert read_number(written(value)) == value


@given(st.text() | st.text("0123456789.,_'eE+-^x kMBTPFdays", max_size=14))
def test_any_text_is_a_finite_number_or_refused_with_a_quotation(text: str) -> None:
    try:
        value, refusal = read_number(text), repr(text)
    except ValueError as error:
        value, refusal = 0.0, str(error)
    assert math.isfinite(value)
    assert repr(text) in refusal


def test_long_text_is_refused_at_once() -> None:
    start = time.perf_counter()
    for text in ("1" * 50_000, "1," * 50_000 + "x", "1 " * 50_000 + "x", "1" * 50_000 + "x"):
        with pytest.raises(ValueError, match="number"):
            read_number(text)
        decimal_mark([text])
    assert time.perf_counter() - start < 2.0
