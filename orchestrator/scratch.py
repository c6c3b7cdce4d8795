"""Directories of this machine's for a process's files, none of which outlives it for long.

Each is locked by the process that uses it: one whose lock is free was left by a process that was
killed, and goes when the next begins.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "isoflop-scratch-"
_UNLOCKED = "isoflop-new-"
_LOCK = "lock"


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """An empty directory that only its owner may read, gone with the block.

    It lies in `parent`, by default in the directory for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_orphans(parent)
    made = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent))
    with (made / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = made.rename(made.with_name(PREFIX + made.name.removeprefix(_UNLOCKED)))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError), (path / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
