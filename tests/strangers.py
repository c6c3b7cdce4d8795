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

needs_stranger = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can start a process as another user"
)


def start(program: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a Python program as a user who may do nothing here but what everybody may.

    It imports the standard library only: the stranger may not be able to read ours.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program, *map(str, arguments)],
        user=STRANGER,
        group=STRANGER,
        extra_groups=[],
        cwd="/",
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
