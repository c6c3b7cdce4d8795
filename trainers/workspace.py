"""A trial's place to work and its checkpoints: the seam to whatever stores them.

A trainer writes and reads files; when, how many and where they go is its caller's business.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

SUFFIX = ".checkpoint"

State = TypeVar("State")


class UnreadableError(Exception):
    """A file is no checkpoint that this trial can go on from: cut short, foreign or too old."""


class Workspace(Protocol):
    """What a trial's caller lends it. One trainer at a time uses it, from one thread.

    Promises: a checkpoint appears whole or not at all, whatever dies and whenever. It may be seen
    by the next attempt on any machine, but need not be: a trial can always start anew.
    """

    @property
    def directory(self) -> Path:
        """Scratch of this trial on this machine. Exists; may be empty at the next attempt."""
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step`. Cheap: asked once every step.

        A trainer whose steps take microseconds asks after a few of them, so that steps are skipped.
        A caller that wants the trial to stop says yes here, and stops at the next `Step`.
        """
        ...

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep the one file that `write` makes at the path that it is given.

        Works whether or not one is due. An OSError may come out of it, or be swallowed with a
        warning: no trial needs its checkpoints.
        """
        ...

    def checkpoints(self) -> Iterator[Path]:
        """Local paths of whole checkpoints, newest first; fetched as the iterator advances."""
        ...

    def set_aside(self, path: Path, reason: str) -> None:
        """Keep a checkpoint that cannot be read out of the way of later attempts, and warn."""
        ...


def resume(workspace: Workspace, read: Callable[[Path], State]) -> State | None:
    """What `read` makes of the newest checkpoint that it can read; None where there is none.

    Those for which it raises `UnreadableError` are set aside. Any other error is passed on, from
    the workspace too: a storage that fails now may answer the next attempt.
    """
    for path in workspace.checkpoints():
        try:
            return read(path)
        except FileNotFoundError:  # a newer one has replaced it since it was listed
            continue
        except UnreadableError as error:
            workspace.set_aside(path, str(error))
    return None


def verify(content: Any, *, key: str, version: int) -> Mapping[str, Any]:
    """`content` of a checkpoint, if it is of this trial and in this format.

    Raises
    ------
    UnreadableError
        If it is of another trial, of another version of the format, or something else altogether.
    """
    if not isinstance(content, dict) or not {"key", "version"} <= content.keys():
        raise UnreadableError("it is no checkpoint")
    if content["key"] != key:
        raise UnreadableError(f"it is of trial {content['key']}, not of {key}")
    if content["version"] != version:
        raise UnreadableError(f"its format is version {content['version']}, not {version}")
    return content


@dataclass
class Scratch:
    """A `Workspace` on one local directory, for tests, notebooks and trials that restart anew."""

    directory: Path
    every_steps: int | None = None
    """A checkpoint is due whenever another multiple of it is reached or passed; never if None."""
    keep: int = 2
    """Checkpoints kept: one more than needed, in case the newest cannot be read."""
    _asked: int = field(default=0, init=False, repr=False)

    def due(self, step: int) -> bool:
        """Whether a multiple of `every_steps` has been reached since it was asked last."""
        before = min(self._asked, step - 1)  # a new attempt starts at an earlier step
        self._asked = step
        return (
            self.every_steps is not None and step // self.every_steps > before // self.every_steps
        )

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a file beside the others, sync it, name it, drop the oldest."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{step}.{uuid.uuid4().hex}"
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.directory / f"{step:012d}{SUFFIX}")
        finally:
            temporary.unlink(missing_ok=True)
        for old in list(self.checkpoints())[self.keep :]:
            old.unlink(missing_ok=True)

    def checkpoints(self) -> Iterator[Path]:
        """The directory's checkpoints, by step."""
        return iter(sorted(self.directory.glob(f"[!.]*{SUFFIX}"), reverse=True))

    def set_aside(self, path: Path, reason: str) -> None:
        """Rename it, so that it is no checkpoint any more."""
        path.replace(path.with_suffix(".unreadable"))
        warnings.warn(f"checkpoint {path} is set aside: {reason}", stacklevel=2)
