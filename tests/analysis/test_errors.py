"""An error in a line."""

import pytest

from analysis.errors import InputError, first_line, last_line


@pytest.mark.parametrize(
    ("said", "first", "named", "last"),
    [
        (ValueError("one"), "one", "ValueError: one", "one"),
        (ValueError("\n  one \ntwo\n\n"), "one", "ValueError: one", "two"),
        (ValueError(), "ValueError", "ValueError", "ValueError"),
        (InputError("a sentence"), "a sentence", "a sentence", "a sentence"),
        ("Traceback\n  at a line\nValueError: one\n", "Traceback", None, "ValueError: one"),
        (" \n", "", None, ""),
    ],
)
def test_an_error_in_a_line(
    said: BaseException | str, first: str, named: str | None, last: str
) -> None:
    assert (first_line(said), last_line(said)) == (first, last)
    if named is not None:
        assert first_line(said, named=True) == named
