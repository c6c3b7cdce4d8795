"""Attempts: who is or was training what, and how each attempt that gave no row ended."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Literal

from analysis.errors import InputError
from analysis.observations import ObservationId
from orchestrator.records import Instant, LeftOut, Whole, parse_record, timestamp, unreadable
from orchestrator.storage import Storage
from trainers.trial import Trial

DIRECTORY = "attempts"
Kind = Literal["raised", "silent", "slow", "worker lost", "driver lost", "node lost", "interrupted"]
BLAMELESS: frozenset[Kind] = frozenset({"driver lost", "interrupted"})
"""Ends that say nothing of the trial, which the next run takes up again."""
BLAMED: frozenset[Kind] = frozenset({"raised", "silent", "slow"})
"""Ends that count against `limits.retries`; the others are not the trial's fault."""


OUT_OF_MEMORY = "OutOfMemoryError"
"""Torch's exception, as records name it."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of one process to measure one observation."""

    trial: str
    """Its key."""
    tokens: Whole
    number: Whole
    """From 1, ascending with time for one trial; a number may be missing."""
    id: str
    """A random word: whose record this is, should an answer of the storage be lost."""
    driver: Whole
    """Generation of the lease under which it was started."""
    node: str
    """Name of the machine."""
    pid: Whole
    started_at: Instant
    """UTC, ISO format, by the clock of its machine."""
    resumed_from: Whole | None = None
    """The step of the checkpoint that it started from; None without one, or if it told no end."""
    ended_at: Instant | None = None
    kind: Kind | None = None
    """How it ended; None while it is open."""
    error: str | None = None
    """In one sentence."""
    traceback: str | None = None
    log: str | None = None
    """The tail of what it printed."""
    step: Whole | None = None
    """The last step that is known of it."""

    @property
    def open(self) -> bool:
        """Whether no end has been written: it runs, or its process could not write one."""
        return self.kind is None

    @property
    def out_of_memory(self) -> bool:
        """Whether it ended because a GPU's memory did not suffice, in whichever of its ranks."""
        return OUT_OF_MEMORY in f"{self.error}{self.traceback}"

    @property
    def observation(self) -> ObservationId:
        """What it was to measure."""
        return self.trial, self.tokens


class Attempts:
    """One small file an attempt, `attempts/<trial>-<number>.json`, in a project's storage.

    Contract: an attempt is on record, open, before its training starts. It is removed when its
    trial's row is in the ledger; else its end stays on record. So after any crash each attempt is
    either open, and closed by the next one of its trial at the latest, or explained. Two processes
    that begin the same trial at once get two numbers. Of two ends of one attempt, which only a
    worker and a driver that gave it up can write, the first one stays, or either of them if they
    are written within the same moment. Records are read one by one: a list of them is no snapshot.
    A record that is damaged, of another version, or not of the attempt that its name says is left
    out: it is nobody's.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def begin(
        self,
        trial: Trial,
        *,
        driver: int,
        node: str,
        pid: int,
    ) -> Attempt:
        """Record that an attempt starts, and close those of its trial that were left open.

        Those are lost: with their driver, if another one started them, else with their worker.
        """
        before = self.of(trial.key)
        for other in before:
            if other.open:
                same = other.driver == driver
                who = "worker process" if same else "driver"
                kind: Kind = "worker lost" if same else "driver lost"
                self.fail(other, kind=kind, error=f"its {who} was gone when the next one began")
        attempt = Attempt(
            trial=trial.key,
            tokens=trial.tokens,
            number=1 + max((other.number for other in before), default=0),
            id=uuid.uuid4().hex,
            driver=driver,
            node=node,
            pid=pid,
            started_at=timestamp(),
        )
        return self._create(attempt)

    def succeed(self, attempt: Attempt) -> None:
        """Forget an attempt, since its trial's row is in the ledger."""
        self.storage.remove(_name(attempt))

    def fail(
        self,
        attempt: Attempt,
        *,
        kind: Kind,
        error: str,
        traceback: str | None = None,
        log: str | None = None,
        resumed_from: int | None = None,
        step: int | None = None,
    ) -> Attempt:
        """Record how an attempt ended, unless it succeeded or its end is on record already.

        Returns what is on record.
        """
        name = _name(attempt)
        found = self.storage.read_many([name]).get(name)
        if found is None:  # it has succeeded
            return attempt
        on_record = self._readable(name, found)
        if on_record is not None and not on_record.open:
            return on_record
        ended = replace(
            attempt,
            ended_at=timestamp(),
            kind=kind,
            error=error,
            traceback=traceback,
            log=log,
            resumed_from=resumed_from,
            step=step,
        )
        self.storage.replace(name, _dump(ended))
        return ended

    def lost(
        self,
        trial: Trial,
        *,
        driver: int,
        kind: Kind,
        error: str,
        detail: str | None = None,
        after: int = 0,
    ) -> Attempt:
        """Close the open attempt of a trial whose process can do so no more.

        Parameters
        ----------
        trial, driver
            Whose attempt under which lease.
        kind, error, detail
            What the driver knows of it; `detail` is kept as its traceback.
        after
            The number of the trial's last attempt when the driver handed it out. If a later one
            has ended by itself, this changes nothing. If there is none at all, the process died
            before it could begin one: a closed one is recorded in its place.

        Returns
        -------
        The attempt that is on record as ended.
        """
        own = [other for other in self.of(trial.key, driver=driver) if other.number > after]
        for other in own:
            if other.open:
                return self.fail(other, kind=kind, error=error, traceback=detail)
        if own:
            return own[-1]
        now = timestamp()
        return self._create(
            Attempt(
                trial=trial.key,
                tokens=trial.tokens,
                number=after + 1,
                id=uuid.uuid4().hex,
                driver=driver,
                node="",
                pid=0,
                started_at=now,
                ended_at=now,
                kind=kind,
                error=error,
                traceback=detail,
            )
        )

    def settle(
        self, measured: Collection[ObservationId], *, driver: int, interrupted: bool
    ) -> None:
        """Leave none open, when `driver` has no worker any more, `interrupted` or not.

        One at what is `measured` is removed: its process died right after it had written the row.
        """
        kind: Kind = "interrupted" if interrupted else "worker lost"
        told = "it did not stop in time" if interrupted else "its process told no end"
        for attempt in self.all():
            if attempt.open and attempt.observation in measured:
                self.succeed(attempt)
            elif attempt.open and attempt.driver == driver:
                self.fail(attempt, kind=kind, error=told)

    def of(self, key: str, *, driver: int | None = None) -> list[Attempt]:
        """Attempts of one trial, oldest first; those under one lease, if it is given."""
        readable, _ = self._read(f"{key}-")
        own = [a for a in readable if a.trial == key and driver in (None, a.driver)]
        return sorted(own, key=lambda a: a.number)

    def all(self) -> list[Attempt]:
        """Every attempt on record that can be read, oldest first."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Attempt], list[LeftOut]]:
        """Return the attempts on record, oldest first, and the records that are left out."""
        readable, left_out = self._read("")
        return sorted(readable, key=lambda a: (a.started_at, a.number)), left_out

    def _read(self, prefix: str) -> tuple[list[Attempt], list[LeftOut]]:
        names = self.storage.names(DIRECTORY, prefix)
        paths = [f"{DIRECTORY}/{name}" for name in names if name.endswith(".json")]
        readable, left_out = [], []
        for path, data in self.storage.read_many(paths).items():
            try:
                readable.append(self._parse(path, data))
            except InputError as error:
                left_out.append(LeftOut(file=path, reason=str(error)))
        return readable, left_out

    def _parse(self, name: str, data: bytes) -> Attempt:
        place = self.storage.place(name)
        attempt = parse_record(Attempt, place, data)
        if _name(attempt) != name:
            raise unreadable(place, f"it is attempt {attempt.number} at trial {attempt.trial}")
        return attempt

    def _readable(self, name: str, data: bytes) -> Attempt | None:
        """Return the attempt of a record, None where it is damaged or another one's."""
        try:
            return self._parse(name, data)
        except InputError:
            return None

    def _create(self, attempt: Attempt) -> Attempt:
        """Record it under its number, or the next one that is free."""
        # An open one tells of processes, which no power cut survives either.
        while not self.storage.create(_name(attempt), _dump(attempt), durable=not attempt.open):
            found = self.storage.read_many([_name(attempt)]).get(_name(attempt))
            on_record = None if found is None else self._readable(_name(attempt), found)
            if on_record is not None and on_record.id == attempt.id:
                break
            attempt = replace(attempt, number=attempt.number + 1)
        return attempt


def _name(attempt: Attempt) -> str:
    return f"{DIRECTORY}/{attempt.trial}-{attempt.number}.json"


def _dump(attempt: Attempt) -> bytes:
    return json.dumps(asdict(attempt), indent=1).encode()
