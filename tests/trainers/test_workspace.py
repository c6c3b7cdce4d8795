"""A checkpoint appears whole or not at all, and what cannot be read is not in the way."""

import multiprocessing
import os
from pathlib import Path

import pytest

from trainers.workspace import Scratch, UnreadableError, resume, verify


def _text(path: Path) -> str:
    text = path.read_text()
    if not text.startswith("good"):
        raise UnreadableError("it is bad")
    return text


def _save(workspace: Scratch, step: int, text: str) -> None:
    workspace.save(step, lambda path: path.write_text(text) and None)


def test_the_newest_by_step_comes_first_and_the_oldest_go(tmp_path: Path) -> None:
    workspace = Scratch(tmp_path / "new", keep=3)
    assert list(workspace.checkpoints()) == []
    for step in (9, 10, 100, 1000):
        _save(workspace, step, f"good {step}")
    assert [path.read_text() for path in workspace.checkpoints()] == [
        "good 1000",
        "good 100",
        "good 10",
    ]
    assert resume(workspace, _text) == "good 1000"


def test_it_is_due_every_so_many_steps_or_never(tmp_path: Path) -> None:
    every_fourth = Scratch(tmp_path, every_steps=4)
    assert [step for step in range(1, 10) if every_fourth.due(step)] == [4, 8]
    assert not any(Scratch(tmp_path).due(step) for step in range(1, 10))
    skipping = Scratch(tmp_path, every_steps=4)
    assert [step for step in (3, 7, 8, 9, 17, 19) if skipping.due(step)] == [7, 8, 17]
    assert [step for step in (3, 7) if skipping.due(step)] == [7]


def _die_half_way(path: Path) -> None:
    path.write_text("goo")
    os._exit(9)


def test_a_process_that_dies_while_it_writes_leaves_the_last_whole_one(tmp_path: Path) -> None:
    workspace = Scratch(tmp_path)
    _save(workspace, 1, "good 1")
    child = multiprocessing.get_context("fork").Process(
        target=workspace.save, args=(2, _die_half_way)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert resume(workspace, _text) == "good 1"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("goo")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        Scratch(tmp_path).save(1, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_set_aside_for_good(tmp_path: Path) -> None:
    workspace = Scratch(tmp_path, keep=4)
    for step, text in enumerate(("good 0", "good 1", "bad", "bad")):
        _save(workspace, step, text)
    with pytest.warns(UserWarning, match="set aside: it is bad") as warned:
        assert resume(workspace, _text) == "good 1"
    assert len(warned) == 2
    assert len(list(workspace.checkpoints())) == 2
    assert len(list(tmp_path.glob("*.unreadable"))) == 2


def test_a_checkpoint_that_vanishes_is_passed_over_and_a_failing_disk_is_not(
    tmp_path: Path,
) -> None:
    workspace = Scratch(tmp_path)
    _save(workspace, 1, "good 1")
    _save(workspace, 2, "good 2")

    def vanished(path: Path) -> str:
        if path.read_text() == "good 2":
            raise FileNotFoundError(path)
        return path.read_text()

    def failing(path: Path) -> str:
        raise OSError("input/output error")

    assert resume(workspace, vanished) == "good 1"
    with pytest.raises(OSError, match="input/output"):
        resume(workspace, failing)
    assert len(list(workspace.checkpoints())) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "no checkpoint"),
        ({"key": "a"}, "no checkpoint"),
        ({"key": "b", "version": 1}, "of trial b, not of a"),
        ({"key": "a", "version": 2}, "version 2, not 1"),
    ],
)
def test_a_foreign_checkpoint_is_named(content: object, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        verify(content, key="a", version=1)


def test_scratch_keeps_its_own_and_what_went_further(tmp_path: Path) -> None:
    """Of a training that began anew: its newest two, and those at later steps."""
    workspace = Scratch(tmp_path)
    for step in (500, 700, 100, 200, 300):
        workspace.save(step, lambda path: path.write_text("state"))
    assert [int(path.stem) for path in workspace.checkpoints()] == [700, 500, 300, 200]
