"""A program as a child process: what it says line by line, how it ends, and that it ends.

Knows nothing of trials. A guard (`trainers.guard`) stands between, so that the program and all that
it starts end with this process, even if that is killed.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainers import guard

TICK_SECONDS = 0.1
"""Between looks at the file that a program may write its lines to."""
AHEAD = 10_000
"""Lines that a program may be ahead of who reads them, before it waits."""
LONGEST_LINE = 1 << 20
"""Bytes; what is longer is cut."""
LEAVE_SECONDS = 5.0
"""For the pipes to close once the program has ended; what escaped its guard may hold them."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of what a program says."""

    text: str
    source: Literal["output", "errors", "file"]
    read_ns: int
    """When it was read, on the clock of files."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    exit: int | None = None
    """Its exit status, less than 0 for a signal."""
    error: str | None = None
    """Why it did not start."""


class Child:
    """A running program. Use as a context manager: it is gone when that is left."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], directory: Path, file: Path
    ) -> None:
        """Start it in `directory`; lines that it appends to `file` are read like its output."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno()), *argv],
                cwd=directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._link = ours
        self._file = file
        self._lines: queue.Queue[Line | None] = queue.Queue(AHEAD)
        self._over = threading.Event()
        self.ended: Ended | None = None
        """Known when `lines` has ended; None if it was killed from here."""
        threading.Thread(target=self._read, name="program", daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill it and all that it started, unless it has ended, and wait for that."""
        self._over.set()
        with suppress(OSError):  # the guard has ended by itself
            self._link.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def lines(self) -> Iterator[Line | None]:
        """What it says, to its end; None whenever it has been silent for a moment."""
        while True:
            try:
                line = self._lines.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if line is None:
                return
            yield line

    def stop(self, grace: float) -> Iterator[Line]:
        """Ask it to end by SIGTERM to its whole group; what it says, for at most `grace` s."""
        deadline = time.monotonic() + grace
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        for line in self.lines():
            if line is not None:
                yield line
            if time.monotonic() > deadline:
                return

    def _read(self) -> None:
        """Until every pipe is closed: pass lines on, and hear how it ended."""
        output, errors = self._process.stdout, self._process.stderr
        assert output is not None
        assert errors is not None
        pieces = {output.fileno(): _Pieces("output"), errors.fileno(): _Pieces("errors")}
        written = _Pieces("file")
        offset, until = 0, float("inf")
        with selectors.DefaultSelector() as waiting, self._link, output, errors:
            for stream in (output, errors, self._link):
                waiting.register(stream, selectors.EVENT_READ)
            while waiting.get_map() and time.monotonic() < until:
                for key, _ in waiting.select(TICK_SECONDS):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        waiting.unregister(key.fileobj)
                    elif key.fileobj is self._link:
                        self.ended = Ended(**json.loads(chunk))
                        self._link.shutdown(socket.SHUT_RDWR)  # the guard may go
                    else:
                        self._pass_on(pieces[key.fd].add(chunk))
                    if not chunk and key.fileobj is self._link:
                        until = time.monotonic() + LEAVE_SECONDS
                more = _read_from(self._file, offset)
                offset += len(more)
                self._pass_on(written.add(more))
        while more := _read_from(self._file, offset):
            offset += len(more)
            self._pass_on(written.add(more))
        for unfinished in (*pieces.values(), written):
            self._pass_on(unfinished.rest())
        self._put(None)

    def _pass_on(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._put(line)

    def _put(self, line: Line | None) -> None:
        while not self._over.is_set():
            with suppress(queue.Full):
                self._lines.put(line, timeout=TICK_SECONDS)
                return


@dataclass
class _Pieces:
    """Bytes as they come, cut into lines."""

    source: Literal["output", "errors", "file"]
    _held: bytes = field(default=b"", init=False)

    def add(self, chunk: bytes) -> list[Line]:
        """The lines that `chunk` ends."""
        *whole, self._held = (self._held + chunk).split(b"\n")
        if len(self._held) > LONGEST_LINE:
            whole, self._held = [*whole, self._held], b""
        return [self._line(text) for text in whole]

    def rest(self) -> list[Line]:
        """What stands after the last line's end."""
        return [self._line(self._held)] if self._held else []

    def _line(self, text: bytes) -> Line:
        decoded = text.decode(errors="replace").rstrip("\r")
        return Line(text=decoded, source=self.source, read_ns=time.time_ns())


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(LONGEST_LINE)
    except OSError:  # not there yet, or taken away
        return b""
