"""The lease: one driver at a time in a project, wherever it runs and however it dies.

Contract: leases are `leases/<generation>.json`, made by create-if-absent, and the highest
generation owns the project. So of any number of drivers that want it at once one gets it, and
whoever was taken for dead and is not finds out by a later generation; until then both may write,
which the ledger and the attempts survive. No clock of two machines is ever compared: a driver is
taken for alive while the counter in its lease moves.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from analysis.errors import InputError
from orchestrator.records import Instant, Whole, parse_record, timestamp, unreadable
from orchestrator.storage import Storage

DIRECTORY = "leases"
BEAT = 5.0
"""Seconds between two beats of a holder."""
STALE = 30.0
"""Seconds without a beat after which a holder on another machine is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """What is on record of the driver that holds a project, or held it."""

    generation: Whole = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A random word: whose record this is, should an answer of the storage be lost."""
    host: str
    boot: str
    """What this start of the machine is called; process ids begin anew with the next one."""
    namespace: str
    """Where its process id counts: containers of one machine have their own."""
    pid: Whole
    born: str
    """When the process started, as its machine counts: ids are used again."""
    purpose: str
    """What it does, for people."""
    since: Instant
    """UTC, ISO format, by its own clock."""
    beat: Whole = 0
    """Moves while it lives."""
    beat_at: Literal[""] | Instant = ""
    """Time of the last beat: UTC, ISO format, by its own clock."""
    released: bool = False
    note: dict[str, Any] = field(default_factory=dict)
    """What it wants others to know, such as how many trials are running."""

    @property
    def holder(self) -> str:
        """Who it is, for people."""
        since = self.since[:16].replace("T", " ")
        return f"process {self.pid} on {self.host}, {self.purpose} since {since} UTC"


class Lease:
    """A lease that is held; it beats in a thread of its own until it is released.

    A storage that fails is tried again at the next beat, however long: the lease is lost only when
    a later generation exists.
    """

    def __init__(self, storage: Storage, record: LeaseRecord) -> None:
        self.lost = threading.Event()
        """Set once another driver has taken the project over."""
        self._storage = storage
        self._record = record
        self._ended = False
        self._hurry = threading.Event()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """Its number, by which its workers ask whether it is still current."""
        return self._record.generation

    def note(self, note: dict[str, Any], *, at_once: bool = False) -> None:
        """What the next beat says; it comes now if others should know `at_once`."""
        with self._changing:
            self._record = replace(self._record, note=note)
        if at_once:
            self._hurry.set()

    def release(self) -> None:
        """Give it back at once; one that cannot be written becomes stale instead."""
        self._ended = True
        self._hurry.set()
        self._thread.join(STALE)
        if self._thread.is_alive():  # the storage does not answer: a beat is still on its way
            return
        with suppress(OSError):
            self._write(released=True)

    def _beat_on(self) -> None:
        while True:
            self._hurry.wait(BEAT)
            self._hurry.clear()
            if self._ended:
                return
            # The next beat may go through. Whoever waits for this one to move waits for several.
            with suppress(Exception):  # whatever a store's client raises
                self._write(released=False)

    def _write(self, *, released: bool) -> None:
        """Write the next beat, or notice that a later generation exists."""
        if _newest(self._storage) > self.generation:
            self.lost.set()
            return
        with self._changing:
            self._record = replace(
                self._record, beat=self._record.beat + 1, beat_at=timestamp(), released=released
            )
            record = self._record
        self._storage.replace(_name(record.generation), _dump(record))


@contextmanager
def hold(
    storage: Storage, note: str, *, waiting: Callable[[str], None] | None = None
) -> Iterator[Lease]:
    """Keep other drivers out of a project.

    A holder on this machine is looked up among its processes: alive it is refused, dead it is
    replaced at once. One on another machine is watched: if it beats it is refused, within 2 beats;
    if it does not it is replaced after `STALE` seconds.

    Parameters
    ----------
    storage
        The project's.
    note
        What this driver does, for people.
    waiting
        Told in a sentence why it takes long.

    Raises
    ------
    InputError
        If another driver is at work. It names that driver.
    """
    mine = _take(storage, _this_process(note), waiting)
    lease = Lease(storage, mine)
    try:
        yield lease
    finally:
        lease.release()


def current(storage: Storage) -> LeaseRecord | None:
    """The latest lease of a project, unless it was released; its holder may be dead.

    Raises
    ------
    InputError
        If its record is damaged or of another version.
    """
    found = latest(storage)
    return None if found is None or found.released else found


def latest(storage: Storage) -> LeaseRecord | None:
    """The latest lease of a project, released or not; None where there never was one."""
    return _read(storage, _newest(storage))


def is_alive(record: LeaseRecord) -> bool:
    """Whether a lease's holder seems to be at work: for people, since clocks are compared here."""
    known = _known_alive(record)
    if known is not None:
        return known
    beaten = datetime.fromisoformat(record.beat_at or record.since)
    return (datetime.now(UTC) - beaten).total_seconds() < STALE


def _take(
    storage: Storage, mine: LeaseRecord, waiting: Callable[[str], None] | None
) -> LeaseRecord:
    """Make the next generation `mine`, as soon as nobody else's is alive."""
    while True:
        newest = _newest(storage)
        before = _read(storage, newest)
        if before is not None and not before.released:
            _require_dead(storage, before, waiting)
        mine = replace(mine, generation=newest + 1)
        if not storage.create(_name(mine.generation), _dump(mine)):
            found = _read(storage, mine.generation)
            if found is None or found.id != mine.id:
                continue  # another one was quicker
        # A number is free again when later holders have come, and swept up what was before them.
        others = _generations(storage)
        if max(others) == mine.generation:
            for older in set(others) - {mine.generation}:
                storage.remove(_name(older))
            return mine
        storage.remove(_name(mine.generation))


def _require_dead(
    storage: Storage, other: LeaseRecord, waiting: Callable[[str], None] | None
) -> None:
    """Wait until a lease's holder is known to be dead, or has gone."""
    alive = _known_alive(other)
    if alive is False:
        return
    if alive:
        raise _occupied(storage, other)
    if waiting is not None:
        waiting(f"{other.holder} left a lease: waiting up to {STALE:.0f} s for a sign of life")
    start = time.monotonic()
    while time.monotonic() - start < STALE:
        time.sleep(BEAT / 5)
        now = _read(storage, other.generation)
        if now is None or now.released:
            return
        if now.beat != other.beat:
            raise _occupied(storage, other)


def _occupied(storage: Storage, other: LeaseRecord) -> InputError:
    return InputError(
        f"another isoflop ({other.holder}) is running in {storage.uri}: wait for it, or use "
        "another --project"
    )


def _known_alive(record: LeaseRecord) -> bool | None:
    """Whether a process of this machine lives; None for one of another machine or container."""
    here = (socket.gethostname(), _boot(), _namespace())
    if (record.host, record.boot, record.namespace) != here:
        return None
    return _born(record.pid) == record.born


def _this_process(purpose: str) -> LeaseRecord:
    return LeaseRecord(
        host=socket.gethostname(),
        boot=_boot(),
        namespace=_namespace(),
        pid=os.getpid(),
        born=_born(os.getpid()) or "",
        purpose=purpose,
        since=timestamp(),
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return str(psutil.boot_time())


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process started; None where there is none, or its parent has not yet buried it."""
    try:
        # In ticks since the machine started: psutil's time moves when the clock is set.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]  # proc(5): fields 3 and 22
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    with suppress(psutil.NoSuchProcess):
        return str(psutil.Process(pid).create_time())
    return None


def _generations(storage: Storage) -> list[int]:
    names = (name.rpartition(".") for name in storage.names(DIRECTORY))
    return [int(stem) for stem, _, suffix in names if suffix == "json" and stem.isdecimal()]


def _newest(storage: Storage) -> int:
    return max(_generations(storage), default=0)


def _read(storage: Storage, generation: int) -> LeaseRecord | None:
    name = _name(generation)
    data = storage.read_many([name]).get(name)
    if data is None:
        return None
    record = parse_record(LeaseRecord, storage.place(name), data)
    if record.generation != generation:
        raise unreadable(storage.place(name), f"it is the lease of generation {record.generation}")
    return record


def _name(generation: int) -> str:
    return f"{DIRECTORY}/{generation}.json"


def _dump(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), indent=1).encode()
