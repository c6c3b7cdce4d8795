"""A program's checkpoint directory as one file, and what we want to know when it is unpacked."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

from trainers.workspace import UnreadableError, verify

VERSION = 1
"""Raise it whenever an archive holds something else: older ones are then set aside."""
CLOCK_SECONDS = 0.02
"""Longer than a tick of the clock of files, 4 or 10 ms, within which what is new looks older."""
STATE, FILES = "isoflop.json", "files"
"""Ours, and the program's. Ours is the last part: an archive without it was cut short."""
HERE = "."
"""How a directory is called within itself."""


def pack(files: Path, told_ns: int, state: dict[str, Any], path: Path) -> None:
    """Make one file of a program's checkpoint, if it is still as it was when it was told of.

    The program goes on meanwhile, and may write over what it told of.

    Raises
    ------
    OSError
        If it has, or nothing is there.
    """
    before = _look(files)
    if before.keys() == {HERE}:
        raise OSError("the program's checkpoint directory is empty")
    with tarfile.open(path, "w") as tar:
        tar.add(files, arcname=FILES)
        content = json.dumps({"version": VERSION, **state}).encode()
        part = tarfile.TarInfo(STATE)
        part.size = len(content)
        tar.addfile(part, io.BytesIO(content))
    time.sleep(CLOCK_SECONDS)
    after = _look(files)
    changed = [
        name
        for name, (written_ns, _) in after.items()
        if written_ns > told_ns or before.get(name) != after[name]
    ]
    if changed and changed != [HERE]:
        raise OSError(f"{changed[0]} was written after the program told that it was whole")
    if changed or before.keys() != after.keys():
        raise OSError("files were added or removed after the program told that they were whole")


def _look(directory: Path) -> dict[str, tuple[int, int]]:
    """When everything in it was written, on the clock of files, and how large it is.

    Last comes the directory itself, whose time is that of the last name that came or went.
    """
    found = {path: path.lstat() for path in (*directory.rglob("*"), directory)}
    return {
        path.relative_to(directory).as_posix(): (stat.st_mtime_ns, stat.st_size)
        for path, stat in found.items()
    }


def unpack(path: Path, to: Path, key: str) -> dict[str, Any]:
    """Put a program's files where it looks for them; return what was packed beside them.

    Whoever can write to the project can have written it: paths and links that lead outside are
    refused.

    Raises
    ------
    UnreadableError
        If it is cut short, foreign, or leads outside.
    """
    unpacking = to.with_name("unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        with tarfile.open(path, "r:") as tar:
            state_file = tar.extractfile(STATE)
            assert state_file is not None
            state = dict(verify(json.load(state_file), key=key, version=VERSION))
            for part in tar:
                _require_inside(part, unpacking.resolve())
                tar.extract(part, unpacking, set_attrs=not part.isdir())
    except (tarfile.TarError, KeyError, ValueError, AssertionError) as error:
        raise UnreadableError(f"it cannot be unpacked ({error})") from error
    shutil.rmtree(to)
    (unpacking / FILES).rename(to)
    return state


def _require_inside(part: tarfile.TarInfo, root: Path) -> None:
    """Refuse a part that would be written outside of `root`, or that is a link to there.

    What is unpacked already counts: a link may lead through another. (Python's own filter for this
    came with 3.11.4.)
    """
    if not (part.isfile() or part.isdir() or part.issym() or part.islnk()):
        raise tarfile.TarError(f"{part.name} is a device")
    places = [root / part.name]
    if part.issym():
        places.append(places[0].parent / part.linkname)
    elif part.islnk():
        places.append(root / part.linkname)
    if not all(place.resolve().is_relative_to(root) for place in places):
        raise tarfile.TarError(f"{part.name} leads outside of it")
