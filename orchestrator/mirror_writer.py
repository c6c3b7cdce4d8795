"""The process that writes MLflow beside a sweep; see `mirror.py`, which starts it.

Reads lines: `KEY TOKENS` for an observation that is in the ledger, a JSON object for a mark, which
asks to catch up with the whole ledger and perhaps to attach results. Says lines, JSON objects:
`stage`, `written`, `behind`, `error`, and `read` and `mark`, the lines and the mark that it has
dealt with. Ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import IO, Any

from analysis.errors import first_line
from analysis.observations import ObservationId
from orchestrator.masking import masked
from orchestrator.mirror import CLOSE_SECONDS, LONGEST_PAUSE_SECONDS
from orchestrator.project import Project, open_project
from orchestrator.tracking import Results, Store, Tracker, store_of, trust_the_disk

PAUSE_SECONDS = 0.5
"""Between looks at what is finished, so that rows are read many at a time."""
SAY_EVERY_SECONDS = 0.2
NICENESS = 10
"""Training comes first."""


class Inbox:
    """What the driver said. Always read at once, so that the driver never waits to say it."""

    def __init__(self, stream: IO[str]) -> None:
        self.closed = False
        self.read = 0
        self.names: list[ObservationId] = []
        self._marks: list[dict[str, Any]] = []
        self._news = threading.Condition()
        threading.Thread(target=self._listen, args=[stream], daemon=True).start()

    def wait(self, seconds: float | None) -> bool:
        """Until there is a mark, or no more time; without `seconds`, anything. False at the end."""
        with self._news:
            self._news.wait_for(
                lambda: self.closed or self._marks or (seconds is None and self.names), seconds
            )
            return not self.closed

    def take(self) -> tuple[list[ObservationId], list[dict[str, Any]]]:
        """The names and marks since the last time."""
        with self._news:
            names, marks = self.names, self._marks
            self.names, self._marks = [], []
            return names, marks

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            with self._news:
                self.read += 1
                if line.startswith("{"):
                    self._marks.append(json.loads(line))
                else:
                    key, tokens = line.split()
                    self.names.append((key, int(tokens)))
                self._news.notify_all()
        with self._news:
            self.closed = True
            self._news.notify_all()
        time.sleep(CLOSE_SECONDS)  # for the run that is being written, unless MLflow hangs
        os._exit(1)


class Writer:
    """Keeps a project's runs up with its ledger until the driver has no more to say."""

    def __init__(self, project: Project, store: Store, inbox: Inbox, output: IO[str]) -> None:
        self._project, self._store, self._inbox, self._output = project, store, inbox, output
        self._tracker: Tracker | None = None
        self._pending: dict[ObservationId, None] = {}
        self._marks: list[dict[str, Any]] = []
        self._mark = self._written = 0
        self._error: str | None = None
        self._last = 0.0

    def run(self) -> None:
        """Write until the end of the input. While MLflow is away, try ever less often."""
        pause: float | None = 0.0
        while self._inbox.wait(pause):
            try:
                self._work()
                self._inbox.wait(PAUSE_SECONDS)
                pause = None
            except Exception as error:  # whatever it is, training must not know of it
                self._tracker, self._error = None, masked(first_line(error, named=True))
                self._say("waiting")
                pause = min(max(1.0, 2 * (pause or 0.0)), LONGEST_PAUSE_SECONDS)

    def _work(self) -> None:
        """Write whatever is missing, and deal with the marks."""
        names, marks = self._inbox.take()
        self._marks += marks
        self._pending.update(dict.fromkeys(names))
        if self._tracker is None:
            self._say("connecting")
            self._tracker = Tracker(self._project, self._store)
            self._pending = dict.fromkeys(self._tracker.missing())
        if any(name not in self._tracker.planned for name in names):
            self._tracker.read_plans()
        if self._marks:
            self._tracker.refused.clear()  # a last try
            self._pending.update(dict.fromkeys(self._tracker.missing()))
        self._error = None
        for name in self._tracker.write(list(self._pending)):
            del self._pending[name]
            self._written += 1
            if time.monotonic() - self._last > SAY_EVERY_SECONDS:
                self._say("writing")
            if self._inbox.closed:
                return
        self._pending.clear()
        while self._marks:
            if self._marks[0]["results"] is not None:
                self._tracker.conclude(Results(**self._marks[0]["results"]))
            self._mark = self._marks.pop(0)["mark"]
        trouble = [*self._tracker.refused.values(), *self._tracker.unattached.values()]
        self._error = trouble[0] if trouble else None
        self._say("done")

    def _say(self, stage: str) -> None:
        refused = len(self._tracker.refused) if self._tracker else 0
        said = {
            "stage": stage,
            "written": self._written,
            "behind": len(self._pending) + len(self._inbox.names) + refused,
            "error": self._error,
            "read": self._inbox.read,
            "mark": self._mark,
        }
        self._last = time.monotonic()
        self._output.write(json.dumps(said) + "\n")
        self._output.flush()


def main(location: str) -> None:
    """Write the MLflow that MLFLOW_TRACKING_URI names for the project at `location`."""
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what MLflow prints is no answer to the driver
    inbox = Inbox(sys.stdin)
    project = open_project(location)
    store = store_of(project)
    assert store is not None
    trust_the_disk()
    Writer(project, store, inbox, output).run()
    os._exit(0)  # threads that wait for a server that hangs are not waited for
