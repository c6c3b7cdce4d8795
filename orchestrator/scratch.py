"""Directories of this machine's for a process's files, none of which outlives it for long.

Each is locked by the process that uses it: one whose lock is free was left by a process that was
killed, and goes when the next begins. Other users may write in the directory for temporary files,
too: what they put there under such a name is left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "isoflop-scratch-"
_UNLOCKED = "isoflop-new-"
_LOCK = "lock"
_SYSTEM = (0, 65534)
"""User IDs of the system's directories: root, and, in containers that do not know the machine's
root, the kernel's overflow ID (/proc/sys/kernel/overflowuid)."""


@contextmanager
def scratch(parent: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """An empty directory that only its owner may read, gone with the block.

    It lies in `parent`, by default in the directory for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_orphans(parent, prefix)
    made = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent))
    with (made / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = made.rename(made.with_name(prefix + made.name.removeprefix(_UNLOCKED)))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def who_can_rename_in(directory: Path) -> str | None:
    """Return how other users could replace what lies in `directory`; None if they cannot.

    They could where they may write and no sticky bit forbids it, here or in a directory above.
    """
    try:
        path = directory.resolve(strict=True)
        above = [(place, place.stat()) for place in (path, *path.parents)]
    except OSError as error:
        return f"{directory} cannot be looked at ({error.strerror})"
    for place, status in above:
        if status.st_uid not in (os.geteuid(), *_SYSTEM):
            return f"{place} belongs to another user"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            return f"{place} is writable by others and has no sticky bit (chmod +t {place})"
    return None


def _remove_orphans(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            _remove_orphan(path)


def _remove_orphan(path: Path) -> None:
    """Remove a directory of ours whose lock is free.

    No link is followed, and nothing is opened for which one must wait, such as a named pipe.

    Raises
    ------
    OSError
        If it is no directory, or in use.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    directory = os.open(path, flags | os.O_DIRECTORY)
    try:
        lock = os.open(_LOCK, flags, dir_fd=directory)
        try:
            statuses = os.fstat(directory), os.fstat(lock)
            ours = all(status.st_uid == os.geteuid() for status in statuses)
            if ours and stat.S_ISREG(statuses[1].st_mode):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
    finally:
        os.close(directory)
