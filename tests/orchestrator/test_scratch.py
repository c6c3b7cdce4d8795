"""Directories for trials' files, and what killed processes leave of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.scratch import scratch

HOLDS = """
import sys, time
from orchestrator.scratch import scratch
with scratch() as path:
    (path / "checkpoint").write_text("large")
    print(path, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_it_is_gone_after_the_block(tmp_path: Path) -> None:
    with scratch() as path, scratch() as other:
        assert path != other
        (path / "file").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_that_of_a_killed_process_goes_when_the_next_begins_and_not_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch():
            assert (theirs / "checkpoint").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert theirs.exists()
    with scratch() as ours:
        assert list(tmp_path.iterdir()) == [ours]
