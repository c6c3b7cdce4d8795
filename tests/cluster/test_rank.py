"""Where ranks sit, and their signs of life: while they wait for their workspace, and only then."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.gang import environments, seats
from cluster.rank import Home, Rank, Sign
from tests.waiting import wait
from trainers.template import NODE_GPUS
from trainers.trial import Event, Step, Trial
from trainers.workspace import Scratch, Workspace


def test_a_group_with_gpus_seats_one_rank_a_gpu_and_one_without_one_a_core() -> None:
    assert [seat.bundle for seat in seats([{"CPU": 1}, {"GPU": 2, "CPU": 1}])] == [1, 1]
    assert [dict(seat.resources) for seat in seats([{"CPU": 2}])] == [{"CPU": 1}] * 2
    marked = {"GPU": 8, "CPU": 8, "accelerator_type:H100": 0.001}
    assert [dict(seat.resources) for seat in seats([marked])] == [{"GPU": 1, "CPU": 1}] * 8


def test_ranks_know_their_place_on_nodes_that_share_an_address() -> None:
    homes = [
        Home(node=node, address="10.0.0.1", pid=1, port=port, gpu=gpu)
        for node, port, gpu in (("a", 7, "4"), ("a", 8, "2"), ("b", 9, "0"))
    ]
    made = environments(homes)
    assert [e["RANK"] for e in made] == ["0", "1", "2"]
    assert [e["LOCAL_RANK"] for e in made] == ["0", "1", "0"]
    assert [e["LOCAL_WORLD_SIZE"] for e in made] == ["2", "2", "1"]
    assert [e[NODE_GPUS] for e in made] == ["4,2", "4,2", "0"]  # LOCAL_RANK chooses among them
    assert {(e["WORLD_SIZE"], e["MASTER_ADDR"], e["MASTER_PORT"]) for e in made} == {
        ("3", "10.0.0.1", "7")
    }


@dataclass
class Slow(Scratch):
    """A workspace whose storage is away until a test brings it back."""

    tell: Callable[[str], None] = print
    back: threading.Event = field(default_factory=threading.Event)

    def _wait(self) -> None:
        self.tell("the storage is away")
        assert self.back.wait(20)

    def measured(self, tokens: int) -> bool:
        self._wait()
        return False

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        self._wait()

    def checkpoints(self) -> Iterator[Path]:
        self._wait()
        yield from ()

    def set_aside(self, path: Path, reason: str) -> None:
        self._wait()

    def keep_model(self, tokens: int, write: Callable[[Path], None]) -> None:
        self._wait()


@dataclass
class Using:
    """Does one thing with its workspace, and then waits as if it hung."""

    use: Callable[[Workspace], object]
    used: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        yield Step(1)
        self.use(workspace)
        self.used.set()
        assert self.over.wait(20)
        yield Step(2)


def test_what_a_ranks_trainer_tells_is_in_its_next_sign(make_trial, tmp_path: Path) -> None:
    """As where nothing can be compiled for its GPU."""
    rank, slow = Rank(), Slow(tmp_path)
    trainer = Using(lambda workspace: workspace.tell("torch.compile failed"))

    def workspace(tell: Callable[[str], None]) -> Workspace:
        slow.tell = tell
        return slow

    trainer.over.set()
    rank.follow({}, make_trial(16, 1e9), workspace, lambda name: trainer)
    assert rank.sign() == Sign(troubles=("torch.compile failed",))


@pytest.mark.parametrize(
    "use",
    [
        lambda workspace: workspace.save(1, lambda path: path.write_text("1")),
        lambda workspace: list(workspace.checkpoints()),
        lambda workspace: workspace.set_aside(Path("1"), "damaged"),
        lambda workspace: workspace.keep_model(64, lambda path: None),
        lambda workspace: workspace.measured(64),
    ],
    ids=["save", "checkpoints", "set aside", "keep model", "measured"],
)
def test_a_rank_that_waits_says_so_and_one_that_hangs_does_not(
    make_trial, tmp_path: Path, use: Callable
) -> None:
    rank, trainer, slow = Rank(), Using(use), Slow(tmp_path)

    def workspace(tell: Callable[[str], None]) -> Workspace:
        slow.tell = tell
        return slow

    events = rank.lead({}, make_trial(16, 1e9), workspace, lambda name: trainer)
    thread = threading.Thread(target=lambda: list(events))
    assert rank.sign() is None
    thread.start()
    first: list[Sign] = []
    wait(lambda: first or first.extend(filter(None, [rank.sign()])))
    troubles = [t for sign in (*first, rank.sign()) for t in sign.troubles]
    assert troubles == ["the storage is away"]
    assert rank.sign() == Sign()
    slow.back.set()
    assert trainer.used.wait(20)
    assert rank.sign() is None
    trainer.over.set()
    thread.join(20)
