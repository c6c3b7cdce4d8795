"""A console whose reader may go away."""

from __future__ import annotations

import os

from rich.console import Console

STDOUT, STDERR = 1, 2
"""File descriptors: their names in `sys` are redirected while Ray runs."""


class LastingConsole(Console):
    """Says nothing more once its reader is gone, where rich's own would end the program.

    Ctrl-C ends the `tee` of a pipeline too, and the trials have their checkpoints to write yet.
    """

    def on_broken_pipe(self) -> None:
        """Lead what is written there from now on to nowhere, whoever writes it."""
        self.quiet = True
        broken = os.fstat(self.file.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (STDOUT, STDERR):
            if os.path.samestat(os.fstat(descriptor), broken):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)
