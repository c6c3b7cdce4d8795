"""Runs a program, and ends it and all that it started with the process that asked for it.

A script: `guard.py FD PROGRAM ARGUMENT...`, leader of a process group, FD one end of a socket. The
guard says on it how the program ended. Once the other end is closed, on purpose or because whoever
held it has died, it kills everything below it, and itself last. It imports nothing of isoflop, so
that it starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl: be told of the parent's death; adopt orphans below, such as torchrun's ranks,
which lead process groups of their own."""
END_SECONDS = 2.0
LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None) if LINUX else None


def main() -> None:
    """Run the program of the command line, tell how it ended, and wait to be released."""
    link = socket.socket(fileno=int(sys.argv[1]))
    # SIGTERM is for the program, which does not inherit a handler as it would SIG_IGN.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if LIBC is not None:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    link.sendall(json.dumps(_run(sys.argv[2:])).encode())
    threading.Event().wait()


def _run(argv: list[str]) -> dict[str, int | str]:
    try:
        program = subprocess.Popen(argv, preexec_fn=_die_with_guard if LINUX else None)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"exit": program.wait()}


def _die_with_guard() -> None:
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_with(link: socket.socket) -> None:
    link.recv(1)
    # More than once: some are born meanwhile. Not for ever: one in the kernel's hands may not die.
    until = time.monotonic() + END_SECONDS
    while (below := _descendants(os.getpid())) and time.monotonic() < until:
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _descendants(root: int) -> list[int]:
    """Living processes below one, by Linux's /proc; none known elsewhere."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")  # a name may hold anything
        except OSError:
            continue
        state, parent, *_ = rest.split()
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = list(children.get(root, ()))
    for pid in found:  # grows on the way
        found += children.get(pid, ())
    return found


if __name__ == "__main__":
    main()
