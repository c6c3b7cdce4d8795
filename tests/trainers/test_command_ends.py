"""How the user's own program ends, and that it does: by real signals."""

import json
import os
import signal
import subprocess
import sys

import pytest

from analysis.errors import InputError
from tests.trainers.commands import RESULT, MakeCommand, alive, failure, measure
from tests.waiting import wait
from trainers.command import Commanded
from trainers.workspace import Scratch

# How it ends


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('iter 10: loss 2.5')", "ended without a result, a line such as"),
        (
            "import os, sys; sys.stdout.buffer.write(os.urandom(300_000) * 8)",
            "ended without a result",
        ),
        ("raise SystemExit(3)", "exited with 3"),
        (
            "print('{\"loss\": 3.0}'); raise SystemExit(1)",
            "exited with 1, so that the result it had given does not count",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os.abort()", "was killed by SIGABRT"),
    ],
)
def test_a_bad_end_is_an_error_that_says_how(
    commanded: MakeCommand, workspace: Scratch, program: str, why: str
) -> None:
    assert why in failure(commanded(program), workspace)


def test_a_program_that_hangs_is_ended(commanded: MakeCommand, workspace: Scratch) -> None:
    """Also one that does not heed SIGTERM."""
    trial = commanded(
        """
        import os, pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(600)
        """,
        str(workspace.directory / "pid"),
        timeout_seconds=1.0,
    )
    assert "it ran for more than command.timeout_seconds = 1" in failure(trial, workspace)
    assert not alive(int((workspace.directory / "pid").read_text()))


def test_a_program_that_is_not_there_is_named(commanded: MakeCommand, workspace: Scratch) -> None:
    trial = commanded("", run=("no-such-program", "x"))
    with pytest.raises(InputError, match=r"'no-such-program x' cannot be started on .*: No such f"):
        list(Commanded().train(trial, workspace))


@pytest.mark.skipif(sys.platform != "linux", reason="known by /proc")
def test_what_it_leaves_behind_ends_with_it(commanded: MakeCommand, workspace: Scratch) -> None:
    """Also what leads a group of its own, as torchrun's ranks do."""
    trial = commanded(
        f"""
        import pathlib, subprocess, sys
        for i, apart in enumerate((False, True)):
            left = subprocess.Popen(["sleep", "600"], start_new_session=apart)
            pathlib.Path(sys.argv[1], str(i)).write_text(str(left.pid))
        print('{RESULT}')
        """,
        str(workspace.directory),
    )
    assert measure(trial, workspace).loss == 3.0
    for name in "01":
        assert not alive(int((workspace.directory / name).read_text()))


# That it ends


@pytest.mark.skipif(sys.platform != "linux", reason="known by /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_does_not_outlive_its_worker(
    commanded: MakeCommand, workspace: Scratch, number: signal.Signals
) -> None:
    trial = commanded(
        """
        import os, pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        below = subprocess.Popen(["sleep", "600"], start_new_session=True)
        pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {below.pid} {os.getppid()}")
        while True:
            print("alive")
            time.sleep(0.1)
        """,
        str(workspace.directory / "pids"),
    )
    (workspace.directory / "trial.json").write_text(json.dumps(trial.to_dict()))
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, pathlib, sys\n"
            "from trainers.command import Commanded\n"
            "from trainers.trial import Trial\n"
            "from trainers.workspace import Scratch\n"
            "place = pathlib.Path(sys.argv[1])\n"
            "trial = Trial.from_dict(json.loads((place / 'trial.json').read_text()))\n"
            "list(Commanded().train(trial, Scratch(place)))\n",
            str(workspace.directory),
        ],
        stdout=subprocess.DEVNULL,
    )
    file = workspace.directory / "pids"
    pids = [int(pid) for pid in wait(lambda: file.exists() and file.read_text().split(), 30)]
    assert all(map(alive, pids))
    worker.send_signal(number)
    worker.wait(10)
    wait(lambda: not any(map(alive, pids)), 10)


# On several ranks


def test_only_the_first_rank_is_heard(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(Commanded().train(commanded("print('rank 1')"), workspace)) == []
    assert "exited with 3" in failure(commanded("raise SystemExit(3)"), workspace)
    assert os.environ["RANK"] == "1"
