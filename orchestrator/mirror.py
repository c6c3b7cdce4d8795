"""MLflow written beside the training, by a process of its own that the driver starts.

The writer has its own interpreter, so that neither its imports nor its work ever hold the driver
up, and its niceness, so that training comes first. It is told by its standard input what is in the
ledger, reads that itself, and says on its standard output how far it is. It may die or be killed at
any time: another one finds out from MLflow and the ledger what is missing. It never outlives its
driver by more than the run that it is writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from analysis.errors import last_line
from analysis.observations import ObservationId
from analysis.wording import plural
from orchestrator.artifacts import keep_inside
from orchestrator.masking import masked
from orchestrator.project import Project
from orchestrator.tracking import Results, Store, store_of

RESTARTS = 5
"""Times in a row that a writer may die without having written anything."""
PATIENCE_SECONDS = 30.0
"""How long the end of a sweep waits for a writer that does not get on."""
CLOSE_SECONDS = 10.0
"""How long a writer may take to finish its run."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between tries, of the driver to have a writer and of the writer to have MLflow."""
NO_STORE = (
    "MLflow is not written, since the project is no directory: --tracking-uri says where it is"
)
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from orchestrator.mirror_writer import main; main(sys.argv[2])"
)
"""The driver's own path: the working directory may hold packages of the same names as ours."""


class Mirror:
    """A project's MLflow runs, kept up with the ledger while a sweep runs. A context manager.

    Nothing here blocks, fails or slows down for MLflow's sake, save `catch_up` and `conclude`,
    which wait no longer than they say. Where the project has no store, nothing is written.
    """

    def __init__(self, project: Project, plan: str, *, tracking_uri: str | None = None) -> None:
        """Of what a plan of this name asks for, now and while it grows, and all other plans."""
        self.store = store_of(project, tracking_uri)
        self._home, self._project, self._plan = project, project.uri, plan
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._news = threading.Condition()
        self._said: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        self._sent = self._marks = 0
        self._mark: str | None = None
        self._over = self.store is None
        self._started = False
        self._closing = threading.Event()
        self._died: str | None = None
        self._keeper = threading.Thread(target=self._keep, name="mlflow", daemon=True)
        self._feeder = threading.Thread(target=self._feed, name="mlflow lines", daemon=True)

    def __enter__(self) -> Mirror:
        return self

    def caution(self) -> str | None:
        """Return what to say of the store before a sweep; artifacts that lie elsewhere are moved.

        Raises
        ------
        InputError
            If the project's own store leads out of the project.
        """
        if self.store is None:
            return NO_STORE
        with contextlib.suppress(OSError):  # which the writer meets and reports, too
            return keep_inside(self._home) if self.store.own else None
        return None

    def start(self) -> None:
        """Have the writer started, at the latest when there is something to write.

        Not at once: it imports MLflow for seconds, in which Ray and the first worker start too.
        """
        if self.store is not None and not self._started:
            self._started = True
            self._keeper.start()
            self._feeder.start()

    def __exit__(self, *exception: object) -> None:
        if not self._started:
            return
        self._closing.set()
        self._lines.put(None)
        self._keeper.join(CLOSE_SECONDS)
        if self._keeper.is_alive() and self._process is not None:
            self._process.kill()
            self._keeper.join(CLOSE_SECONDS)

    def finished(self, name: ObservationId) -> None:
        """An observation's row is in the ledger."""
        if not self._over:
            self.start()
            self._lines.put(f"{name[0]} {name[1]}\n")

    @property
    def behind(self) -> int:
        """Observations that are not known to be in MLflow yet."""
        with self._news:
            unread = self._sent + self._lines.qsize() - int(self._said.get("read", 0))
            return 0 if self.store is None else int(self._said.get("behind", 0)) + max(0, unread)

    @property
    def error(self) -> str | None:
        """What the writer is waiting for, if it cannot write; None while all is well."""
        return self._said.get("error") or self._died

    @property
    def shortfall(self) -> str | None:
        """What MLflow lacks and what to do about it, a sentence; None if nothing."""
        if self.store is None or not (self.error or self.behind or self._waiting()):
            return None
        why = f" ({self.error})" if self.error else ""
        if self._said.get("stage") == "done" and not self.behind and not self._waiting():
            return f"MLflow lacks some files of the sweep{why}: run it again to attach them"
        lacks = f"lacks {plural(self.behind, 'run')}" if self.behind else "may lack runs"
        return f"MLflow {lacks}{why}: isoflop sync {self._project} writes them"

    def catch_up(self, timeout: float = PATIENCE_SECONDS) -> bool:
        """Wait until MLflow equals the ledger; False once nothing has moved for `timeout` s."""
        return self._wait_for(None, timeout)

    def conclude(self, metrics: dict[str, float], artifacts: list[Path], *, ended: bool) -> bool:
        """Catch up, then attach the sweep's results to its run, and close it if it has `ended`.

        False once nothing has moved for half a minute; `shortfall` then says what is missing.
        """
        paths = tuple(str(path.resolve()) for path in artifacts)
        results = Results(plan=self._plan, metrics=metrics, artifacts=paths, ended=ended)
        return self._wait_for(results, PATIENCE_SECONDS)

    def _wait_for(self, results: Results | None, timeout: float) -> bool:
        if self.store is None:
            return True
        self.start()
        self._marks += 1
        mark = {"mark": self._marks, "results": asdict(results) if results else None}
        self._mark = json.dumps(mark) + "\n"
        self._lines.put(self._mark)
        seen, since = None, time.monotonic()
        with self._news:
            while self._waiting() and not self._over:
                # Not its stage: while MLflow is away, that goes to and fro.
                connected = self._said.get("stage") in ("writing", "done")
                now = (self._said.get("process"), self._said.get("written"), connected)
                if now != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since >= timeout:
                    break
                self._news.wait(min(1.0, timeout))
            return not self._waiting()

    def _waiting(self) -> bool:
        return int(self._said.get("mark", 0)) < self._marks

    def _keep(self) -> None:
        """Start the writer, hear it, and start another when it dies."""
        failures = 0
        while failures <= RESTARTS and not self._closing.is_set():
            wrote = 0
            try:
                with tempfile.TemporaryFile("w+") as log:
                    wrote, code = self._hear(log)
                    if not self._closing.is_set():
                        log.seek(0)
                        said = masked(last_line(log.read()))
                        why = f": {said}" if said else ""
                        self._died = f"its writer ended with exit code {code}{why}"
            except OSError as error:  # no more processes, or no room for the log
                self._died = f"its writer cannot start: {error}"
            failures = 0 if wrote else failures + 1
            self._closing.wait(min(2.0**failures, LONGEST_PAUSE_SECONDS))
        with self._news:
            self._over = True
            self._news.notify_all()

    def _hear(self, log: IO[str]) -> tuple[int, int]:
        """One writer's life: how many runs it wrote, and its exit code."""
        assert self.store is not None
        process = _start(self._project, self.store, log)
        with self._news:
            again = self._process is not None
            self._process, self._sent = process, 0
            self._said = {"process": process.pid}
        if again and self._mark is not None:
            self._lines.put(self._mark)
        if self._closing.is_set():
            _send(process, None)
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # else it was killed while it spoke
                with self._news:
                    self._said = {"process": process.pid, **json.loads(line)}
                    self._died = None
                    self._news.notify_all()
        code = process.wait()
        _send(process, None)
        process.stdout.close()
        return int(self._said.get("written", 0)), code

    def _feed(self) -> None:
        """Pass lines on. What a dying writer lost is in the ledger, for the next one to find."""
        while (line := self._lines.get()) is not None:
            while self._process is None and not self._closing.wait(0.05):
                pass
            process = self._process
            if process is not None:
                _send(process, line)
                with self._news:
                    self._sent += process is self._process
        if self._process is not None:
            _send(self._process, None)


def _start(project: str, store: Store, log: IO[str]) -> subprocess.Popen[str]:
    path = json.dumps([entry for entry in sys.path if entry])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", BOOT, path, project],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri},  # may hold a password: not said in ps
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C is for the driver, which then has this one finish
    )


def _send(process: subprocess.Popen[str], line: str | None) -> None:
    """Send a line; None closes. Nothing happens where the process is gone."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        if line is None:
            process.stdin.close()
        else:
            process.stdin.write(line)
            process.stdin.flush()
