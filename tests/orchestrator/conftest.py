"""One Ray for all tests that need it, since starting one takes seconds; and the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from orchestrator.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from orchestrator.sweep import ray_cluster

    with ray_cluster():
        yield


@pytest.fixture
def isoflop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isoflop", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
