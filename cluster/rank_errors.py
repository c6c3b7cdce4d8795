"""Tells the cause among the errors of a gang's ranks, and puts all of them into a sentence.

Where one rank raises, the others lose their connections to it and raise as well, often earlier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.errors import first_line

NAMED = 3
"""Errors beside the cause that are quoted; of more only the ranks are given."""
_CONNECTION = re.compile(
    r"connection (?:closed|reset|refused|was|lost|error)|broken pipe|socket (?:timeout|closed)"
    r"|timed? ?out|gloo|nccl(?:remote|system|internal)error|remote process exited"
    r"|unhandled system error|network error|failed to recv|recv(?:value)? failed",
    re.IGNORECASE,
)
"""How Gloo, NCCL and torch's store say that another rank does not answer."""
_CONNECTION_TYPES = frozenset({"DistNetworkError", "DistStoreError", "DistBackendError"})


@dataclass(frozen=True)
class RankError:
    """The error of one rank."""

    rank: int
    cause: BaseException
    account: str
    """Its traceback, as Ray gives it."""

    @property
    def of_connection(self) -> bool:
        """Whether it says no more than that another rank does not answer."""
        kind = type(self.cause)
        return (
            issubclass(kind, ConnectionError | TimeoutError)
            or kind.__name__ in _CONNECTION_TYPES
            or (issubclass(kind, RuntimeError) and bool(_CONNECTION.search(str(self.cause))))
        )


def by_cause(errors: Sequence[RankError]) -> list[RankError]:
    """Return errors in the order they came, but those that blame the connection after the others.

    Examples
    --------
    >>> lost = RankError(0, RuntimeError("[pair.cc:537] Connection closed by peer"), "")
    >>> [error.rank for error in by_cause([lost, RankError(1, ValueError("nan"), "")])]
    [1, 0]
    """
    return sorted(errors, key=lambda error: error.of_connection)


def others_in_a_clause(errors: Sequence[RankError]) -> str:
    """Return what the other ranks raised, as the end of a sentence; empty if they raised nothing.

    Examples
    --------
    >>> lost = RankError(0, RuntimeError("[pair.cc:537] Connection closed by peer"), "")
    >>> others_in_a_clause([RankError(3, KeyError("x"), ""), lost])
    "; rank 3 raised KeyError: 'x'; rank 0 lost its connection"
    """
    own = [error for error in errors if not error.of_connection]
    quoted = [
        f"rank {error.rank} raised {first_line(error.cause, named=True)}" for error in own[:NAMED]
    ]
    more = [error.rank for error in own[NAMED:]]
    if more:
        quoted.append(f"{_ranks(more)} raised as well")
    lost = [error.rank for error in errors if error.of_connection]
    if lost:
        quoted.append(f"{_ranks(lost)} lost {'its' if len(lost) == 1 else 'their'} connection")
    return "".join(f"; {text}" for text in quoted)


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"
