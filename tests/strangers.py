"""Another user of this machine: runs programs that attack, with a user ID that owns nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STRANGER = 54321
"""A user ID that no account has."""

PREAMBLE = """
import encodings.idna, http.client, json, os, signal, socket, stat, sys, time
import urllib.error, urllib.request
os.setgroups([])
os.setgid({0})
os.setuid({0})
os.chdir("/")
"""
"""What runs before an attacker's program: the interpreter may lie where a stranger cannot read."""

needs_stranger = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can start a process as another user"
)


def start(program: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a Python program as a user who may do nothing here but what everybody may.

    It may use the modules of `PREAMBLE`.
    """
    source = PREAMBLE.format(STRANGER) + program
    return subprocess.Popen(
        [sys.executable, "-I", "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def run(program: str, *arguments: object) -> Any:
    """Run such a program to its end; returns the JSON that it printed."""
    with start(program, *arguments) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, "the attacker's own program failed"
    return json.loads(output)


def give(directory: Path) -> Path:
    """Make a directory that belongs to the stranger; returns it."""
    directory.mkdir()
    os.chown(directory, STRANGER, STRANGER)
    return directory
