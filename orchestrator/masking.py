"""Secrets in URIs, settings and headers: found by their names, and masked in what is shown.

It knows how people write secrets, not the secrets themselves.
"""

from __future__ import annotations

import re

HIDDEN = "***"
"""Text in a secret's place."""
_PASSWORD = r"//[^/\s@]*:(?!\d+/)\S*@"
"""A user with a password, in which a database takes a slash, too. A port is none."""
_USER = re.compile(rf"{_PASSWORD}|//[^/\s]*@")
_LOGIN = re.compile(rf"{_PASSWORD}|https?://[^/\s]+@", re.IGNORECASE)
"""A user alone may be a token in HTTP; `git@` of SSH is none."""
_KEY = r"(?:api|access|account|auth|private|secret|shared)_?key"
"""Names of keys that open something. A searchKey and a number of key-value heads open nothing."""
_QUERY = re.compile(
    r"([?&;](?:[^=?&;\s]*(?:pass|pwd|token|secret|signature|credential|auth(?!or))[^=?&;\s]*"
    rf"|(?:[^=?&;\s]*[_-])?key|[^=?&;\s]*{_KEY}(?:_?id)?)=)(?!\*{{3}})[^&;\s]+",
    re.IGNORECASE,
)
_END = (
    rf"(?:(?<![A-Za-z0-9])(?:key|token)|{_KEY}|(?:access|auth|api)token|secret|passw(?:or)?d)"
    r"(?:_id)?(?:_?\d+)?"
)
"""End of a secret's name. In the middle of one, as in MAX_TOKEN_LENGTH, the words count things."""
_NAME = re.compile(rf"{_END}$", re.IGNORECASE)
_SETTING = re.compile(
    rf"(?<![\w?&;])(?!(?-i:key=))(\w*{_END}=['\"]?)(?!\*{{3}})[^\s'\"]+", re.IGNORECASE
)
"""A variable and its value. `key=` in small letters is a trial's."""
_HEADER = re.compile(
    r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:basic|bearer)\s+)?+|\bbearer\s+(?=\S{16}))"
    r"(?!\*{3})[^\s'\",;)]+",
    re.IGNORECASE,
)
"""What shows an HTTP client's right. Without `Authorization`, the word after `bearer` must be long,
since it may be one of English."""


def masked(text: str) -> str:
    """Return a text without the secrets of the URIs, settings and HTTP headers in it.

    Examples
    --------
    >>> masked("cannot connect to postgresql://me:secret@db/mlflow")
    'cannot connect to postgresql://***@db/mlflow'
    >>> masked("http://db/mlflow?user=me&password=secret&sslmode=require")
    'http://db/mlflow?user=me&password=***&sslmode=require'
    >>> masked("HF_TOKEN=hf_abc and Authorization: Bearer hf_abc")
    'HF_TOKEN=*** and Authorization: Bearer ***'
    """
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"//{HIDDEN}@", text))
    return _SETTING.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))


def shows_secret(text: str) -> bool:
    """Return whether a URI in the text has a password, a token or a key.

    Examples
    --------
    >>> shows_secret("http://me:secret@host"), shows_secret("git+ssh://git@host/repository")
    (True, False)
    """
    return bool(_LOGIN.search(text) or _QUERY.search(text))


def names_secret(variable: str) -> bool:
    """Return whether an environment variable's name says that its value is a secret.

    Examples
    --------
    >>> names_secret("HF_TOKEN"), names_secret("MAX_TOKEN_LENGTH")
    (True, False)
    """
    return _NAME.search(variable) is not None
