"""A cluster for all fault tests, sweeps for each, and the table of what faults cost."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.project import create_project
from tests.faults.processes import Cluster, Steps
from tests.faults.sweeps import CHECKPOINTS, SIMULATED, Sweep, describe

NODES = 2
_seeds = itertools.count(1000)
_table: list[dict[str, object]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One after the other those that share a cluster, and those whose drivers start their own."""
    for item in items:
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents:
            shared = "cluster" in item.fixturenames
            group = "faults on a cluster" if shared else "faults on one machine"
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """What all processes count of the steps of their trainers."""
    return Steps(tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="session")
def shared_cluster(steps: Steps) -> Iterator[Cluster]:
    cluster = Cluster(steps.directory)
    yield cluster
    cluster.end()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """A head and two nodes of two cores each."""
    while len(shared_cluster.nodes) < NODES:
        shared_cluster.add()
    return shared_cluster


MakeSweep = Callable[..., Sweep]


@pytest.fixture
def make_sweep(
    tmp_path: Path, steps: Steps, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeSweep]:
    """Makes a sweep of new trials on a cluster, or where each driver starts a Ray of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made: list[Sweep] = []

    def make(
        cluster: Cluster | None,
        *,
        spec: str = SIMULATED,
        limits: str = "",
        database: bool = True,
        **simulated: float,
    ) -> Sweep:
        directory = tmp_path / f"sweep{len(made)}"
        directory.mkdir()
        told = "".join(f"{name} = {value}\n" for name, value in simulated.items())
        tables = f"[limits]\n{limits}\n" + CHECKPOINTS
        tables += f"[simulated]\n{told}" if simulated else ""
        path = directory / "sweep.toml"
        path.write_text(f"seeds = [{next(_seeds)}]\n{spec}{tables}")
        if database:
            project = create_project(directory / "project")
            shutil.copy(empty_store, project.local / "mlflow.db")
        made.append(Sweep(directory, steps, path, cluster))
        return made[-1]

    yield make
    for sweep in made:
        sweep.end()


Record = Callable[..., None]


@pytest.fixture
def record() -> Record:
    """Adds a line to the table: a sweep whose faults are over, what and how often they were."""

    def add(sweep: Sweep, fault: str, *, times: int = 1, seconds: float | None = None) -> None:
        row = {"fault": fault, "times": times, **describe(sweep), "seconds": seconds}
        _table.append(row)
        assert (row["lost"], row["doubled"]) == (0, 0)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _table:
        return
    terminalreporter.section("faults")
    heads = ("fault", "times", "rows lost", "doubled", "FLOPs repeated", "s to go on")
    line = "{:<46} {:>6} {:>10} {:>8} {:>15} {:>11}"
    terminalreporter.write_line(line.format(*heads))
    for row in _table:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        terminalreporter.write_line(
            line.format(
                *(row["fault"], row["times"], row["lost"], row["doubled"]),
                *(f"{row['repeated']:.2%}", seconds),
            )
        )
