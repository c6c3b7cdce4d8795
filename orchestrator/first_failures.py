"""Whether a sweep is to go on, when its first trials all fail for one and the same reason.

A mistake that every trial makes (a missing module, a program that gives no result) shows in the
first few. A cause that grows with parameters (memory), tokens (a corpus that is too short) or FLOPs
(a time-out) does not stop the small ones: so before the rest is given up, the smallest of them is
tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

FEW = 3
"""Trials that must have been given up, all for one reason and none with a row, before it is taken
for that of all."""
_CHANGING = re.compile(
    r"""
      (?P<status> \b (?: exited\ with | exit\ (?:code|status) :? | signal ) \ -?\d+ )
    | isoflop-scratch-\w+ | (?<=/) tmp\w{8} \b      # directories with random names
    | \b (?=[0-9a-f]*\d) [0-9a-f]{8,} \b           # keys and hashes
    | \d+ (?:[.,]\d+)* (?:e[+-]?\d+)?              # numbers
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Matches numbers and keys, in which errors of one cause differ; a `status` tells causes apart."""


def gist(reason: str) -> str:
    """Return a reason without its numbers, keys and random names; equal gists are one cause.

    The numbers of exit statuses and signals stay.

    Examples
    --------
    >>> gist("trial 0a1b2c3d4e5f6071: tried to allocate 2.50 GiB") == gist(
    ...     "trial ffeeddccbbaa0099: tried to allocate 1.25 GiB")
    True
    >>> gist("exited with 1 after 20 s")
    'exited with 1 after # s'
    """
    return _CHANGING.sub(lambda match: match["status"] or "#", reason)


class FirstFailures:
    """Told how the trials of a sweep end, it holds back those that have not started.

    Parameters
    ----------
    hold
        Holds back all trials that wait, but for the smallest one if there is something of which
        it has less than each of those whose keys it is given; returns that one's key, or None.
    release
        Lets all of them start again.
    """

    def __init__(
        self, hold: Callable[[Collection[str]], str | None], release: Callable[[], None]
    ) -> None:
        self._hold, self._release = hold, release
        self._reasons: dict[str, str] = {}
        self._measured = self._held = False
        self._witness: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the rest is not started; None while it is."""
        if not self._held or self._witness is not None:
            return None
        return next(iter(self._reasons.values()))

    def measured(self) -> None:
        """A trial gave a row: whatever failed, not all trials do."""
        self._measured = True
        self._let_go()

    def failed(self, key: str, reason: str) -> None:
        """A trial was given up."""
        if self._measured:
            return
        self._reasons[key] = reason
        if len({gist(known) for known in self._reasons.values()}) > 1:
            self._let_go()
        elif not self._held and len(self._reasons) >= FEW:
            self._held = True
            self._witness = self._hold(self._reasons.keys())
        elif key == self._witness:
            self._witness = None

    def _let_go(self) -> None:
        if self._held:
            self._held, self._witness = False, None
            self._release()
