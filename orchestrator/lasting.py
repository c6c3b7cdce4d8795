"""A console whose reader may go away, and which does nothing that text of others asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from analysis.visible import UNSEEN, visible

STDOUT, STDERR = 1, 2
"""File descriptors: their names in `sys` are redirected while Ray runs."""


class LastingConsole(Console):
    """A console that outlasts its reader, and that shows control characters and markup as text.

    Once the reader is gone nothing more is printed, where rich's own console would end the program:
    Ctrl-C ends the `tee` of a pipeline too, and the trials have their checkpoints to write yet.

    What is printed may come from tables, projects and machines of others. Everything passes
    `render`, so that no name, error or log reaches the terminal as anything but text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return plain text as rich's, with control characters visible: so it is measured."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of anything printed, with control characters visible."""
        for segment in super().render(renderable, options):
            if segment.control is None and UNSEEN.search(segment.text):
                yield Segment(visible(segment.text), segment.style)
            else:
                yield segment

    def on_broken_pipe(self) -> None:
        """Lead what is written there from now on to nowhere, whoever writes it."""
        self.quiet = True
        broken = os.fstat(self.file.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (STDOUT, STDERR):
            if os.path.samestat(os.fstat(descriptor), broken):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)
