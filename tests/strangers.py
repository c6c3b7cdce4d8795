"""Another user of the same machine, for tests of what such a one can see and do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STRANGER = 65_534
"""A uid that owns nothing: that of `nobody`."""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can run a process as another user"
)


# Once it is the stranger it may not reach the interpreter's own files any more.
_BECOME = f"""
import os, shutil, stat, sys
from pathlib import Path
os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})
"""


def as_stranger(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code as that user, with arguments in `sys.argv`.

    It has os, shutil, stat, sys and Path imported, and may import no more.
    """
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", _BECOME + code, *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
