"""The lease: one driver at a time, whatever becomes of the others. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.errors import InputError
from orchestrator import lease
from orchestrator.lease import LeaseRecord, current, hold, is_alive
from orchestrator.storage import LocalStorage, Storage, open_storage
from tests.waiting import wait

HOLD = """
import sys, time
from orchestrator import lease
from orchestrator.storage import open_storage
lease.BEAT = 0.1
with lease.hold(open_storage(sys.argv[1]), "a sweep") as held:
    print(held.generation, flush=True)
    held.lost.wait()
    print("lost", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.5)


@contextmanager
def _holder(storage: Storage) -> Iterator[subprocess.Popen]:
    """Another process that holds the lease."""
    command = [sys.executable, "-c", HOLD, storage.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip().isdecimal()
            yield process
        finally:
            process.kill()


def _elsewhere(storage: Storage) -> LeaseRecord:
    """Make the holder's record one of another machine, once."""
    record = current(storage)
    assert record is not None
    moved = replace(record, host="another", boot="another")
    storage.replace(f"leases/{record.generation}.json", lease._dump(moved))
    return moved


def test_a_living_holder_is_refused_at_once_and_named(storage: Storage) -> None:
    told: list[str] = []
    with _holder(storage) as process:
        with (
            pytest.raises(
                InputError,
                match=rf"another isoflop \(process {process.pid} on .*, a sweep since 20",
            ),
            hold(storage, "another", waiting=told.append),
        ):
            pass
        assert told == []
        assert is_alive(current(storage))


def test_the_same_process_may_not_hold_it_twice(storage: Storage) -> None:
    with hold(storage, "first"):
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), hold(storage, "second"):
            pass
        assert current(storage).purpose == "first"


def test_a_killed_holder_is_replaced_at_once(storage: Storage) -> None:
    with _holder(storage) as process:
        process.kill()  # and not yet waited for: a zombie is dead
        wait(lambda: not is_alive(current(storage)))
        told: list[str] = []
        with hold(storage, "next", waiting=told.append) as held:
            assert (held.generation, told) == (2, [])
            assert current(storage).pid == os.getpid()
    assert storage.names("leases") == ["2.json"]


def test_a_released_lease_is_free_at_once(storage: Storage) -> None:
    with hold(storage, "first") as held:
        assert held.generation == 1
    assert current(storage) is None
    with hold(storage, "second") as held:
        assert held.generation == 2
        assert current(storage).generation == 2


def test_it_is_released_when_its_driver_raises(storage: Storage) -> None:
    with pytest.raises(KeyError), hold(storage, "first"):
        raise KeyError
    assert current(storage) is None


def test_a_holder_on_another_machine_is_refused_while_it_beats(storage: Storage) -> None:
    """Here it is one: its own beats say so, by a boot of the machine that is not this one."""
    code = HOLD.replace("lease.BEAT", "lease._boot = lambda: 'another'; lease.BEAT")
    command = [sys.executable, "-c", code, storage.uri]
    told: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().strip() == "1"
            assert lease._known_alive(current(storage)) is None
            named = pytest.raises(InputError, match=f"process {process.pid} on")
            with named, hold(storage, "another", waiting=told.append):
                pass
            assert "waiting up to" in told[0]
        finally:
            process.kill()


def test_a_stopped_holder_elsewhere_is_replaced_and_notices(storage: Storage) -> None:
    with _holder(storage) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # a beat that was under way has arrived
        _elsewhere(storage)
        started = time.monotonic()
        with hold(storage, "next") as held:
            assert time.monotonic() - started >= 1.5
            process.send_signal(signal.SIGCONT)
            assert process.stdout.readline().strip() == "lost"
            assert process.wait(10) == 0
            assert held.generation == current(storage).generation == 2
            assert not held.lost.is_set()
    assert "2.json" in storage.names("leases")


def test_of_drivers_that_come_at_once_one_gets_it(storage: Storage) -> None:
    command = [sys.executable, "-c", HOLD, storage.uri]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    drivers = [subprocess.Popen(command, **pipes) for _ in range(5)]
    try:
        wait(lambda: sum(driver.poll() is not None for driver in drivers) == 4)
        (holder,) = [driver for driver in drivers if driver.poll() is None]
        assert current(storage).pid == holder.pid
        for driver in drivers:
            if driver is not holder:
                assert f"process {holder.pid} on" in driver.stderr.read()
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


class _Slow(LocalStorage):
    """A storage in which others are quicker: they come and go before each of our creations."""

    others = 2

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        if self.others:
            self.others -= 1
            for _ in range(2):
                with hold(LocalStorage(self.local), "quicker"):
                    pass
        return super().create(name, data, durable=durable)


def test_a_number_that_became_free_again_is_no_lease(tmp_path: Path) -> None:
    """Ours was taken, given back and swept up by later holders while we were about to take it."""
    storage = _Slow(tmp_path)
    with hold(storage, "slow") as held:
        assert held.generation == 5
        assert current(storage).purpose == "slow"
    assert storage.names("leases") == ["5.json"]


class _Failing(LocalStorage):
    """A storage that can be switched off."""

    off = False

    def replace(self, name: str, data: bytes) -> None:
        if self.off:
            raise OSError("no route to storage")
        super().replace(name, data)


def test_a_storage_that_fails_for_a_while_does_not_end_the_lease(tmp_path: Path) -> None:
    storage = _Failing(tmp_path)
    with hold(storage, "first") as held:
        storage.off = True
        before = current(storage)
        time.sleep(0.5)
        assert current(storage) == before
        storage.off = False
        wait(lambda: current(storage).beat > before.beat)
        assert not held.lost.is_set()


def test_what_a_holder_notes_is_read_by_others(storage: Storage, monkeypatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 60.0)
    with hold(storage, "first") as held:
        held.note({"running": 3})
        time.sleep(0.2)
        assert current(storage).note == {}
        held.note({"running": 2}, at_once=True)
        wait(lambda: current(storage).note == {"running": 2})


def test_a_lease_elsewhere_seems_alive_while_its_last_beat_is_fresh(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with hold(storage, "first"):
        wait(lambda: current(storage).beat > 0)
        record = replace(current(storage), host="another")
        assert is_alive(record)
        assert not is_alive(replace(record, beat_at="2020-01-01T00:00:00+00:00"))
        assert not is_alive(replace(current(storage), born="1"))  # the id of another process now
