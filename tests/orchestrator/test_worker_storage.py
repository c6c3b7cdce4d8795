"""A worker whose storage fails: it waits, says so, and loses nothing that was measured."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator import worker
from orchestrator.storage import LocalStorage
from orchestrator.worker import Work
from tests.orchestrator.workers import STEPS, Bench, Tiny, bench_at


class _Failing(LocalStorage):
    """A storage that fails so many times when it is asked for certain files."""

    failures = 0
    prefix = ""

    def _perhaps(self, name: str) -> None:
        if name.startswith(self.prefix) and self.failures > 0:
            self.failures -= 1
            raise OSError(28, "No space left on device")

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        self._perhaps(name)
        return super().create(name, data, durable=durable)

    def read(self, name: str) -> bytes:
        self._perhaps(name)
        return super().read(name)

    def remove(self, name: str) -> None:
        self._perhaps(name)
        super().remove(name)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bench, _Failing]]:
    """A bench whose workers meet such a storage."""
    storage = _Failing(tmp_path / "project")
    monkeypatch.setattr(worker, "open_storage", lambda uri: storage)
    with bench_at(LocalStorage(tmp_path / "project"), tmp_path, monkeypatch) as made:
        yield made, storage


def test_a_look_at_the_lease_is_no_silence_of_the_trials(tmp_path: Path) -> None:
    inside: list[bool] = []

    class Slow(LocalStorage):
        def names(self, directory: str) -> list[str]:
            inside.append(paused)
            return super().names(directory)

    @contextmanager
    def pause() -> Iterator[None]:
        nonlocal paused
        paused = True
        yield
        paused = False

    paused = False
    will = worker.DriversWill(Slow(tmp_path), 1)
    will.paused = pause
    assert not will.stop()
    assert inside
    assert all(inside)


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        ("leases/", f"{socket.gethostname()} cannot work on the sweep"),
        ("ledger/", "cannot read the ledger"),
        ("attempts/", "cannot record an attempt"),
    ],
)
def test_a_storage_that_fails_at_the_start_is_waited_for(
    failing: tuple[Bench, _Failing], prefix: str, what: str
) -> None:
    bench, storage = failing
    storage.prefix, storage.failures = prefix, 3
    tiny = Tiny()
    bench.run(tiny)
    *troubles, end = bench.told
    assert {t["trouble"] for t in troubles} == {f"{what}: No space left on device; trying again"}
    assert end["status"] == "complete"
    assert tiny.trained == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("prefix", ["ledger/", "attempts/"])
def test_a_storage_that_fails_at_the_end_loses_no_measurement(
    failing: tuple[Bench, _Failing], prefix: str
) -> None:
    bench, storage = failing

    def fail() -> None:
        storage.prefix, storage.failures = prefix, 5

    tiny = Tiny(at={STEPS: fail})
    bench.run(tiny)
    assert len([t for t in bench.told if "trouble" in t]) == 5
    assert bench.told[-1]["status"] == "complete"
    assert tiny.trained == [*range(1, STEPS + 1)]
    assert bench.row is not None
    assert bench.attempts.all() == []


def test_who_waits_for_the_storage_hears_an_interrupt(failing: tuple[Bench, _Failing]) -> None:
    bench, storage = failing
    storage.prefix, storage.failures = "ledger/", 10**9
    told: list[dict[str, Any]] = []

    def report(what: dict[str, Any]) -> None:
        told.append(what)
        if len(told) == 3:
            bench.interrupt()

    Work(bench.order(), report).do()
    assert len([t for t in told if "trouble" in t]) == 3
    assert told[-1] == {"status": "interrupted"}
