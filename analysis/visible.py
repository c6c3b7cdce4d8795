"""Text of others made safe to show: a terminal obeys control characters, and nobody sees them.

A column's name, an error or a host's name may come from a file that somebody else wrote.
"""

from __future__ import annotations

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, DEL, C1: cursor, title, clipboard
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # Unicode's bidirectional controls (UAX 9)
    "\u2028\u2029\ud800-\udfff]"  # other ends of lines; bytes of a name that are no UTF-8
)
"""Characters that do something to a terminal, or to the order of text, and are not seen."""


def visible(text: str) -> str:
    r"""Return the text with its control characters as escapes; tabs and newlines stay.

    Examples
    --------
    >>> visible("loss\x1b]52;c;cm0=\x07")
    'loss\\x1b]52;c;cm0=\\x07'
    """
    return UNSEEN.sub(_escape, text)


def _escape(sign: re.Match[str]) -> str:
    code = ord(sign[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
