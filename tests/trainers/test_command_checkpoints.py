"""Checkpoints of the user's own program, which is killed by real signals."""

import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainers.commands import MakeCommand, failure, measure
from trainers import archive
from trainers.command import Commanded
from trainers.trial import Event, Measurement, Step
from trainers.workspace import Scratch

COUNTS = """
import json, os, pathlib, signal, sys, time
steps, place, stop = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
step = int((place / "state").read_text()) if (place / "state").exists() else 0
first = step
print(f"begins at {first}")
while step < steps:
    step += 1
    print(json.dumps({"step": step, "train_loss": 5 - step / steps}))
    if step % 10 == 0:
        (place / "state").write_text(str(step))
        print(json.dumps({"checkpoint": step}))
        time.sleep(0.3 if first == 0 and stop else 0)  # until it is packed, on a busy machine too
    if step == stop and first == 0:
        os.kill(os.getpid(), signal.SIGKILL)
print('{"loss": 3.0}')
"""


def test_a_killed_program_goes_on_from_its_checkpoint(
    commanded: MakeCommand, workspace: Scratch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = measure(commanded(COUNTS, "{steps}", "{checkpoint}", "0"), workspace)
    workspace.every_steps = 20
    trial = commanded(COUNTS, "{steps}", "{checkpoint}", "45")
    assert "was killed by SIGKILL" in failure(trial, workspace)
    capsys.readouterr()
    measured = measure(trial, workspace)
    assert "begins at 40" in capsys.readouterr().out
    steps = trial.hyperparameters.steps
    assert (measured.resumed_from, measured.steps) == (40, steps - 40)
    assert (measured.loss, measured.curve) == (whole.loss, whole.curve)


def test_one_that_does_not_go_on_is_not_said_to_have(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    workspace.every_steps = 10
    trial = commanded(COUNTS, "{steps}", "{checkpoint}", "25")
    failure(trial, workspace)
    forgetful = COUNTS.replace("if (place", "if False and (place")
    again = commanded(forgetful, "{steps}", "{checkpoint}", "0")
    (workspace.directory / "000000000020.checkpoint").write_bytes(
        _rekeyed(workspace.directory / "000000000020.checkpoint", trial.key, again.key)
    )
    measured = measure(again, workspace)
    assert (measured.resumed_from, measured.steps) == (0, trial.hyperparameters.steps)
    assert [p.step for p in measured.curve] == list(range(1, trial.hyperparameters.steps + 1))


def _rekeyed(path: Path, old: str, new: str) -> bytes:
    return path.read_bytes().replace(old.encode(), new.encode())


def test_what_it_writes_over_meanwhile_is_no_checkpoint(
    commanded: MakeCommand, workspace: Scratch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.every_steps = 6
    trial = commanded(
        """
        import pathlib, sys, time
        state = pathlib.Path(sys.argv[1], "state")
        state.write_text("5")
        print('{"checkpoint": 5}')
        time.sleep(0.1)
        state.write_text("6")
        print('{"step": 6, "train_loss": 3.0}')
        print('{"loss": 3.0, "tokens": %s}' % sys.argv[2])
        """,
        "{checkpoint}",
        "{tokens}",
    )
    assert isinstance(list(Commanded().train(trial, workspace))[-1], Measurement)
    printed = capsys.readouterr().out
    assert "the checkpoint at step 5 is not kept: state was written after" in printed
    assert list(workspace.checkpoints()) == []


class Stopping(Scratch):
    """A workspace whose user wants the trial to stop some time after it has begun."""

    since = 0.0

    def stopping(self) -> bool:
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > 1.0


@pytest.mark.parametrize(
    "chatter",
    ["pass", "sys.stdout.write('log\\n')"],  # in one piece, whenever the signal comes
    ids=["silent", "log"],
)
def test_a_program_that_tells_of_no_step_hears_an_interrupt(
    commanded: MakeCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str], chatter: str
) -> None:
    """Its log is kept, and what it writes when it is asked to end."""
    trial = commanded(
        f"""
        import pathlib, signal, sys, time
        def stop(*_):
            pathlib.Path(sys.argv[1], "state").write_text("whole")
            print('{{"checkpoint": 7}}')
            print("last words")
            raise SystemExit
        signal.signal(signal.SIGTERM, stop)
        print("first words")
        for _ in range(600):
            {chatter}
            time.sleep(0.1)
        """,
        "{checkpoint}",
    )
    workspace, started = Stopping(tmp_path), time.monotonic()
    events = Commanded().train(trial, workspace)
    assert next(events) == Step(0)  # it never told of one
    events.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 10
    printed = capsys.readouterr().out
    assert printed.startswith("first words\n")
    assert printed.endswith("last words\n")
    assert [path.name for path in workspace.checkpoints()] == ["000000000007.checkpoint"]


def test_a_step_that_is_told_again_after_a_resume_keeps_its_held_out_loss(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    """And a result that only repeats it is stale whatever attempt told of it."""
    workspace.every_steps = 50
    program = """
        import json, os, pathlib, signal, sys, time
        state = pathlib.Path(sys.argv[1], "state")
        if not state.exists():
            print('{"step": 50, "train_loss": 3.0, "heldout_loss": 3.25}')
            state.write_text("50")
            print('{"checkpoint": 50}')
            print('{"step": 50, "train_loss": 3.0}')
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        print('{"step": 50, "train_loss": 3.5}')
        print('{"step": 100, "train_loss": 3.0}')
        print('{"loss": %s}' % sys.argv[2])
    """
    stale = commanded(program, "{checkpoint}", "3.25")
    assert "SIGKILL" in failure(stale, workspace)
    assert "is that of step 50" in failure(stale, workspace)
    fresh = commanded(program, "{checkpoint}", "3.0")
    (kept,) = workspace.checkpoints()
    kept.write_bytes(_rekeyed(kept, stale.key, fresh.key))
    measured = measure(fresh, workspace)
    points = [(p.step, p.train_loss, p.heldout_loss) for p in measured.curve]
    assert points == [(50, 3.5, 3.25), (100, 3.0, 3.0)]
    assert (measured.resumed_from, measured.loss_step) == (50, 100)


STOPS = """
import json, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
step = int((place / "state").read_text()) if (place / "state").exists() else 0
def stop(*_):
    (place / "state").write_text(str(step))
    print(json.dumps({"checkpoint": step}))
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
while step < 20:
    step += 1
    print(json.dumps({"step": step, "train_loss": 4.0}))
    time.sleep(0.05)
print('{"loss": 3.0, "tokens": %s}' % sys.argv[2])
"""


def test_an_interrupt_is_heard_while_a_checkpoint_is_due(
    commanded: MakeCommand, tmp_path: Path
) -> None:
    """Of a program that tells of none, each step: by being asked, a workspace hears of it."""
    asked = []

    class Asked(Scratch):
        def due(self, step: int) -> bool:
            asked.append(step)
            return True

    trial = commanded(
        COUNTS.replace('"checkpoint": step', '"other": step'), "{steps}", "{checkpoint}", "0"
    )
    measure(trial, Asked(tmp_path))
    assert asked == list(range(1, trial.hyperparameters.steps + 1))


def test_a_program_that_is_to_stop_may_leave_a_checkpoint(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    trial = commanded(STOPS, "{checkpoint}", "{tokens}")
    events: Iterator[Event] = Commanded().train(trial, workspace)
    stopped = next(e.step for e in events if isinstance(e, Step) and e.step >= 5)
    events.close()  # type: ignore[attr-defined]
    measured = measure(trial, workspace)
    assert measured.resumed_from >= stopped
    assert [p.step for p in measured.curve] == list(range(1, 21))


def test_a_damaged_or_foreign_checkpoint_is_set_aside(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    workspace.every_steps, workspace.keep = 10, 3
    trial = commanded(COUNTS, "{steps}", "{checkpoint}", "35")
    failure(trial, workspace)
    newest, before, _ = workspace.checkpoints()
    newest.write_bytes(newest.read_bytes()[:-4096])  # the part that says that it is whole
    before.write_bytes(_rekeyed(before, trial.key, "0" * 16))
    with pytest.warns(UserWarning, match="is set aside: ") as caught:
        measured = measure(trial, workspace)
    assert [str(w.message).partition("set aside: ")[2][:14] for w in caught] == [
        "it cannot be u",
        "it is of trial",
    ]
    assert measured.resumed_from == 10


@pytest.mark.parametrize(
    "links",
    [
        [("files/../../../evil", None)],
        [("files/link", "{outside}")],
        [("files/up", "../../..")],
        [("files/here", "."), ("files/up", "here/../../../evil")],
    ],
    ids=["a path", "an absolute link", "a relative link", "a link by way of another"],
)
def test_a_checkpoint_does_not_reach_outside(
    commanded: MakeCommand,
    workspace: Scratch,
    tmp_path: Path,
    links: list[tuple[str, str | None]],
) -> None:
    trial = commanded(COUNTS, "{steps}", "{checkpoint}", "0")
    workspace.every_steps, workspace.keep = trial.hyperparameters.steps, 1
    measure(trial, workspace)
    (whole,) = workspace.checkpoints()
    with tarfile.open(whole, "a") as tar:
        for name, target in links:
            part = tarfile.TarInfo(name)
            if target is not None:
                part.type, part.linkname = tarfile.SYMTYPE, target.format(outside=tmp_path)
            tar.addfile(part)
    with pytest.warns(UserWarning, match="cannot be unpacked .*leads outside"):
        measured = measure(trial, workspace)
    assert measured.resumed_from == 0
    assert not (tmp_path / "evil").exists()


def test_links_within_a_checkpoint_are_kept(tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "step-5").mkdir(parents=True)
    (files / "step-5" / "weights").write_text("whole")
    (files / "latest").symlink_to("step-5")
    (files / "best").hardlink_to(files / "step-5" / "weights")
    archive.pack(files, time.time_ns(), {"key": "k", "step": 5}, tmp_path / "packed")
    (there := tmp_path / "there").mkdir()
    assert archive.unpack(tmp_path / "packed", there, "k")["step"] == 5
    assert (there / "latest").is_symlink()
    assert (there / "latest" / "weights").read_text() == "whole"
    assert (there / "best").read_text() == "whole"


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_files_that_go_after_they_were_told_of_are_missed(tmp_path: Path, change: str) -> None:
    """What is left is as it was; that some is gone only its directory's time says."""
    (files := tmp_path / "files").mkdir()
    for name in ("weights", "moments"):
        (files / name).write_text("whole")
    time.sleep(archive.CLOCK_SECONDS)
    told = time.time_ns()
    archive.pack(files, told, {"key": "k"}, tmp_path / "packed")
    if change == "remove":
        (files / "moments").unlink()
    else:
        (files / "moments").rename(files / "old")
    with pytest.raises(OSError, match="added or removed after the program told that they were"):
        archive.pack(files, told, {"key": "k"}, tmp_path / "packed")
