"""A trial's place to work, its checkpoints and its models: the seam to whatever stores them.

A trainer writes and reads files; when, how many and where they go is its caller's business.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

SUFFIX = ".checkpoint"

State = TypeVar("State")


class UnreadableError(Exception):
    """A file is no checkpoint that this trial can go on from: cut short, foreign or too old."""


class Workspace(Protocol):
    """What a trial's caller lends it. One trainer at a time uses it, from one thread.

    Promises: a checkpoint or a model appears whole or not at all, whatever dies and whenever. A
    checkpoint may be seen by the next attempt on any machine, but need not be: a trial can always
    start anew.
    """

    @property
    def directory(self) -> Path:
        """Scratch of this trial on this machine. Exists; may be empty at the next attempt."""
        ...

    def measured(self, tokens: int) -> bool:
        """Whether there is a row of this horizon, of whatever attempt. Asked on resuming alone."""
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step`. Cheap: asked once every step.

        A trainer whose steps take microseconds asks after a few of them, so that steps are skipped.
        A caller that wants the trial to stop says yes here, and stops at the next `Step`.
        """
        ...

    def stopping(self) -> bool:
        """Whether the caller wants the trial to stop. Cheap: asked several times a second.

        For a trainer that waits for something and has done no step meanwhile: where this is true it
        yields the `Step` that it did last, at which the caller stops.
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

    def paused(self) -> AbstractContextManager[None]:
        """Return what is entered while a trainer is silent and yet at work, as when it compiles."""
        ...

    def tell(self, message: str, /) -> None:
        """Have a person know of something that does not stop the trial."""
        ...

    def out_of_memory(self) -> int:
        """Count the earlier attempts at this trial that ended because memory ran out."""
        ...

    @property
    def keeps_models(self) -> bool:
        """Whether a trainer that has weights should leave those that it measures."""
        ...

    def keep_model(self, tokens: int, write: Callable[[Path], None]) -> None:
        """Keep the one file that `write` makes: the model that was measured at a horizon.

        Called before the measurement is told, so that each has its model. One of an earlier attempt
        that told none is replaced.
        """
        ...


def resume(
    workspace: Workspace,
    read: Callable[[Path], State],
    usable: Callable[[State], bool] = lambda state: True,
) -> State | None:
    """What `read` makes of the newest checkpoint that it can read and that is of use; or None.

    Those for which it raises `UnreadableError` are set aside. Any other error is passed on, from
    the workspace too: a storage that fails now may answer the next attempt.
    """
    for path in workspace.checkpoints():
        try:
            state = read(path)
            if usable(state):
                return state
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
    keeps_models: bool = False
    """As `models/<tokens>.safetensors`."""
    rows: set[int] = field(default_factory=set)
    """Horizons whose measurements its user keeps, tokens."""
    _asked: int = field(default=0, init=False, repr=False)

    def measured(self, tokens: int) -> bool:
        """Whether its user has said so."""
        return tokens in self.rows

    def due(self, step: int) -> bool:
        """Whether a multiple of `every_steps` has been reached since it was asked last."""
        before = min(self._asked, step - 1)  # a new attempt starts at an earlier step
        self._asked = step
        return (
            self.every_steps is not None and step // self.every_steps > before // self.every_steps
        )

    def stopping(self) -> bool:
        """Return False: its user just stops to iterate."""
        return False

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a file beside the others, sync it, name it, drop the oldest."""
        _replace(self.directory / f"{step:012d}{SUFFIX}", write)
        before = [path for path in self.checkpoints() if int(path.stem) <= step]
        for old in before[self.keep :]:  # later ones: of a training that went further
            old.unlink(missing_ok=True)

    def checkpoints(self) -> Iterator[Path]:
        """The directory's checkpoints, by step."""
        return iter(sorted(self.directory.glob(f"[!.]*{SUFFIX}"), reverse=True))

    def set_aside(self, path: Path, reason: str) -> None:
        """Rename it, so that it is no checkpoint any more."""
        path.replace(path.with_suffix(".unreadable"))
        warnings.warn(f"checkpoint {path} is set aside: {reason}", stacklevel=2)

    def paused(self) -> AbstractContextManager[None]:
        """Return what does nothing: nobody watches."""
        return nullcontext()

    def tell(self, message: str, /) -> None:
        """Warn of it."""
        warnings.warn(message, stacklevel=2)

    def out_of_memory(self) -> int:
        """Return 0: nobody keeps account of attempts."""
        return 0

    def keep_model(self, tokens: int, write: Callable[[Path], None]) -> None:
        """Write a file beside the others, sync it, name it."""
        _replace(self.directory / "models" / f"{tokens}.safetensors", write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Have the file that `write` makes at a path, where it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
