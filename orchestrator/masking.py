"""Secrets in text: found in URIs and by the names of variables, and masked in what is shown.

It knows how people write secrets, not the secrets themselves.
"""

from __future__ import annotations

import re

HIDDEN = "***"
"""What stands for a secret in a text."""
_PASSWORD = r"//[^/\s@]*:(?!\d+/)\S*@"
"""A user with a password, in which a database takes a slash, too. A port is none."""
_USER = re.compile(rf"{_PASSWORD}|//[^/\s]*@")
_LOGIN = re.compile(rf"{_PASSWORD}|https?://[^/\s]+@", re.IGNORECASE)
"""Of HTTP a user alone may be a token; `git@` of SSH is none."""
_QUERY = re.compile(
    r"([?&;][^=&;\s]*(?:pass|pwd|token|secret|key|signature|credential|auth(?!or))[^=&;\s]*=)"
    r"(?!\*{3})[^&;\s]+",
    re.IGNORECASE,
)
_NAME = re.compile(r"KEY|TOKEN(?!S|IZER)|SECRET|PASSW(OR)?D", re.IGNORECASE)
"""TOKENS are counted, and TOKENIZERS_PARALLELISM is a setting."""


def masked(text: str) -> str:
    """Return a text without the users, passwords and keys of the URIs in it.

    Examples
    --------
    >>> masked("cannot connect to postgresql://me:secret@db/mlflow")
    'cannot connect to postgresql://***@db/mlflow'
    >>> masked("http://db/mlflow?user=me&password=secret&sslmode=require")
    'http://db/mlflow?user=me&password=***&sslmode=require'
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"//{HIDDEN}@", text))


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
    >>> names_secret("HF_TOKEN"), names_secret("BATCH_TOKENS")
    (True, False)
    """
    return _NAME.search(variable) is not None
