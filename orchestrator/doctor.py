"""What would stop a sweep here, and on the nodes of a cluster: all checks together, and a table.

Nothing is started for it: without an address no Ray runs, and with one each node gets one task
that takes nothing of it.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis.errors import InputError, last_line
from cluster.nvidia import SMI_SECONDS
from orchestrator import checks
from orchestrator.checks import Check, Status
from orchestrator.gpu_checks import PROBE_SECONDS, gpu_checks
from orchestrator.storage import Storage, open_storage, reason_of

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.proof import Node

NODE_SECONDS = PROBE_SECONDS + SMI_SECONDS + 60.0
"""Time limit for all nodes to answer: trying GPUs has limits of its own, and a minute starts a
process."""
CLOCK_SECONDS = 30.0
"""Time limit for a node to say what time it is."""
HERE = "this machine"
MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failure": ("FAILURE", "bold red"),
}
"""How a status is shown, and in which style."""
ALIKE = ("isoflop sources", "ray")
"""What nodes must have in common: a sweep refuses other sources, and Ray another Ray."""
SHARED = (*ALIKE, "Python", "isoflop", "torch")
"""What nodes should have in common: with another torch or Python, results differ in last digits."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The answers of one machine."""

    name: str
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The answers of all machines."""

    machines: tuple[Machine, ...]

    def count(self, status: Status) -> int:
        """Return the number of answers of a status."""
        return sum(check.status == status for m in self.machines for check in m.checks)

    @property
    def healthy(self) -> bool:
        """Whether nothing would stop a sweep."""
        return self.count("failure") == 0

    def to_json(self) -> dict[str, Any]:
        """Return everything, as `--json` prints it."""
        return {
            "healthy": self.healthy,
            "failures": self.count("failure"),
            "warnings": self.count("warning"),
            "machines": [
                {"name": m.name, "checks": [check.to_json() for check in m.checks]}
                for m in self.machines
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The answers of a node of a cluster, as the node sends them."""

    host: str
    versions: dict[str, str]
    checks: tuple[Check, ...]


def examine(
    project: str | None = None, address: str | None = None, tracking_uri: str | None = None
) -> Report:
    """Ask all questions of this machine, and of the nodes of the cluster at `address`.

    Parameters
    ----------
    project
        Where its storage is tried, and from which its MLflow store follows.
    address
        A running Ray cluster of which this machine is a node; None for this machine alone.
    tracking_uri
        MLflow's store, if another than the project's or the environment's.

    Raises
    ------
    InputError
        If no cluster answers at `address`, or the project's scheme or the store's URI is unknown.
    """
    storage = None if project is None else open_storage(project)
    own = [*_version_checks(checks.versions()), checks.sockets(), checks.token()]
    own += [] if storage is None else checks.storage_checks(storage)
    own += _mlflow(storage, tracking_uri)
    if address is None:
        own += [*gpu_checks(), checks.memory(), checks.disk()]
        return Report(machines=(Machine(name=HERE, checks=tuple(own)),))
    nodes = _cluster(address, storage)
    return Report(machines=(Machine(name=HERE, checks=tuple(own)), *nodes))


def _version_checks(versions: dict[str, str]) -> list[Check]:
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version == "not installed"]
    if missing:
        remedy = f"install it: pip install {' '.join(missing)}"
        return [Check.failure("versions", text, remedy)]
    return [Check.ok("versions", text)]


def _mlflow(storage: Storage | None, uri: str | None) -> list[Check]:
    """Return the check of the store that a sweep into this project would write to, if any."""
    from orchestrator.project import Project
    from orchestrator.tracking import Store, store_of

    if storage is not None:
        store = store_of(Project(storage), uri)
    else:
        store = None if uri is None else Store(uri=uri, artifacts=None, own=False)
    return [] if store is None else [checks.mlflow(store)]


def _cluster(address: str, storage: Storage | None) -> list[Machine]:
    """Ask every node of a cluster, and whether they agree."""
    from orchestrator.connection import connected, nodes
    from orchestrator.proof import ask_nodes, called, fingerprint, offered

    name, nonce = f".doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    with connected(address):
        there = [node for node in nodes() if node["Alive"]]
        uri = _leave(storage, name, nonce)
        try:
            answers = ask_nodes(
                there, findings, lambda node: (uri, name, nonce, offered(node)), NODE_SECONDS
            )
        finally:
            if storage is not None:
                with suppress(OSError):
                    storage.remove(name)
        clocks = [
            clock_of(partial(_time_on, node)) if isinstance(result, Findings) else None
            for node, result in answers
        ]
    ours = checks.versions() | {"isoflop sources": fingerprint()}
    labels = _labels([called(node) for node, _ in answers])
    return [
        _machine(label, result, ours, clock)
        for label, (_, result), clock in zip(labels, answers, clocks, strict=True)
    ]


def _leave(storage: Storage | None, name: str, nonce: str) -> str | None:
    """Leave a word in the project that nodes look for; None where it cannot be written."""
    if storage is None or (storage.local is not None and not storage.local.is_dir()):
        return None
    try:
        storage.create(name, nonce.encode())
    except OSError:  # this machine's own check of the storage says why
        return None
    return storage.uri


def _labels(names: Sequence[str]) -> list[str]:
    """Number those of equal names: several nodes of one machine share an address."""
    counts, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return labels


def findings(project: str | None, name: str, nonce: str, gpus: int) -> Findings:
    """Ask all questions on a node, on which this is run as a task.

    Parameters
    ----------
    project
        URI of its storage; None for none.
    name, nonce
        A file in it, and what is in the file.
    gpus
        GPUs that Ray says the node has.
    """
    from orchestrator.proof import fingerprint

    results = [] if project is None else [_sees(project, name, nonce)]
    results += [*gpu_checks("torch", gpus), checks.memory(), checks.disk(), checks.token()]
    versions = checks.versions() | {"isoflop sources": fingerprint()}
    return Findings(host=socket.gethostname(), versions=versions, checks=tuple(results))


def _sees(project: str, name: str, nonce: str) -> Check:
    """Return whether this node sees the project that doctor's machine sees, and may write to it."""
    from orchestrator.proof import REMEDY

    try:
        storage = open_storage(project)
        if storage.read_many([name]).get(name) != nonce.encode():
            return Check.failure("project", f"does not see the same {project}", REMEDY)
        reply = f"{name}-{secrets.token_hex(4)}"
        try:
            storage.create(reply, b"")
        finally:
            storage.remove(reply)
    except (InputError, OSError) as error:
        text = reason_of(error) if isinstance(error, OSError) else str(error)
        remedy = "mend permissions or credentials on the node"
        return Check.failure("project", f"cannot write to {project}: {text}", remedy)
    return Check.ok("project", f"sees {project}, and may write")


def _time_on(node: Node) -> float | None:
    """Return a node's time; None if it does not answer."""
    from orchestrator.proof import ask_nodes

    ((_, moment),) = ask_nodes([node], _now, lambda node: (), CLOCK_SECONDS)
    return moment if isinstance(moment, float) else None


def _now() -> float:
    return time.time()


def clock_of(
    ask: Callable[[], float | None], clock: Callable[[], float] = time.time
) -> Check | None:
    """Compare another clock, which `ask` reads, with this machine's; None if it does not answer.

    What its answer takes is no difference: only what lies outside of the time of asking counts.
    """
    before = clock()
    moment = ask()
    after = clock()
    if moment is None:
        return None
    return checks.clock_check("clock", checks.beyond(moment, before, after))


def _machine(name: str, result: Any, ours: dict[str, str], clock: Check | None) -> Machine:
    """Return what a node reported, or that it did not answer."""
    if not isinstance(result, Findings):
        text = str(result) if isinstance(result, TimeoutError) else last_line(result)
        remedy = "see its log in Ray's session directory, and whether isoflop is installed on it"
        return Machine(name=name, checks=(Check.failure("answer", text, remedy),))
    shown = f"{name}, {result.host}"
    answers = [agreement(result.versions, ours), *result.checks, *([clock] if clock else [])]
    return Machine(name=shown, checks=tuple(answers))


def agreement(theirs: dict[str, str], ours: dict[str, str]) -> Check:
    """Return whether a node has the same versions as this machine."""
    differ = {n: f"{n} {theirs[n]}, here {ours[n]}" for n in SHARED if theirs[n] != ours[n]}
    if differ:
        kind = Check.failure if differ.keys() & set(ALIKE) else Check.warning
        remedy = "install the same on all nodes, or use `isoflop submit`, which ships isoflop"
        return kind("versions", "; ".join(differ.values()), remedy)
    text = ", ".join(f"{name} {theirs[name]}" for name in SHARED[1:])
    return Check.ok("versions", f"as here: {text}")


def show(console: Console, report: Report) -> None:
    """Print a table for each machine, and how many answers are bad."""
    from rich.table import Table
    from rich.text import Text

    for machine in report.machines:
        console.print(Text(machine.name, style="bold"))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True, width=7)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in machine.checks:
            mark, style = MARKS[check.status]
            value = Text(check.value)
            if check.remedy:
                value.append(f"\n→ {check.remedy}", style=style)
            table.add_row(Text(mark, style=style), check.name, value)
        console.print(table)
        console.print()
    failures, warnings = report.count("failure"), report.count("warning")
    ends = f"{failures} failure{'s' * (failures != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    stops = "nothing would stop a sweep" if report.healthy else "a failure would stop a sweep"
    console.print(Text(f"{ends}: {stops}", style="bold"))
