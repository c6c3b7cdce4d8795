"""Directories for trials' files, and what killed processes leave of them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.scratch import PREFIX, scratch
from tests.strangers import needs_stranger, run

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


PLANT = """
parent, prefix, target = sys.argv[1:]
start = f"{parent}/{prefix}"
os.mkfifo(f"{start}pipe")
os.mkdir(f"{start}within")
os.mkfifo(f"{start}within/lock")
os.mkdir(f"{start}theirs")
open(f"{start}theirs/lock", "w").close()
open(f"{start}file", "w").close()
os.symlink(target, f"{start}link")
os.mkdir(f"{start}far")
os.symlink(f"{target}/lock", f"{start}far/lock")
print(json.dumps(sorted(os.listdir(parent))))
"""


@needs_stranger
def test_what_another_user_put_under_such_names_neither_stops_nor_misleads_us() -> None:
    """A named pipe would be opened for ever, and a link lead to a directory of ours."""
    made = tempfile.TemporaryDirectory
    with made(dir="/tmp") as shared, made(dir="/tmp") as ours:
        Path(shared).chmod(0o1777)
        Path(ours).chmod(0o755)
        Path(ours, "lock").touch()
        planted = run(PLANT, shared, PREFIX, ours)
        command = [sys.executable, "-c", HOLDS.replace("600", "0")]
        subprocess.run(command, env={**os.environ, "TMPDIR": shared}, check=True, timeout=120)
        assert sorted(os.listdir(shared)) == planted
        assert Path(ours, "lock").exists()


def test_pipes_and_links_of_our_own_are_left_alone(tmp_path: Path) -> None:
    orphan = tmp_path / f"{PREFIX}a"
    orphan.mkdir()
    os.mkfifo(orphan / "lock")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "lock").touch()
    (tmp_path / f"{PREFIX}b").symlink_to(tmp_path / "kept")
    command = [sys.executable, "-c", HOLDS.replace("600", "0")]
    subprocess.run(command, check=True, timeout=120)
    assert stat.S_ISFIFO((orphan / "lock").stat().st_mode)
    assert (tmp_path / "kept" / "lock").exists()
