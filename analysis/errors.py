"""The error and the warning that a person is meant to read; other errors, in a line of each."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    on stderr and exits with code 2; nothing was written.
    """


class PlainWarning(UserWarning):
    """A warning that is a sentence for people: the command line prints it as one, and once."""


def first_line(said: BaseException | str, *, named: bool = False) -> str:
    """The first line of an error, or of what a program said, that has words in it.

    Parameters
    ----------
    said
        An error without words is told by its type, an empty text by nothing.
    named
        Put the error's type before it, but for an `InputError`, which is a sentence.
    """
    line = _lines(said)[0]
    kind = type(said).__name__
    if not named or isinstance(said, InputError) or line == kind:
        return line
    return f"{kind}: {line}"


def last_line(said: BaseException | str) -> str:
    """The last line that has words in it: where programs, and errors from afar, say the cause."""
    return _lines(said)[-1]


def _lines(said: BaseException | str) -> list[str]:
    found = [line.strip() for line in str(said).splitlines() if line.strip()]
    return found or ["" if isinstance(said, str) else type(said).__name__]
