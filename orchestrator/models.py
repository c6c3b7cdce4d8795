"""models/: the weights of finished trials, one file an observation, for whoever wants to use them.

A worker writes the file before the row, in place of one that an attempt without a row has left: so
each row of the default trainer that has a loss has exactly one, unless its sweep wants none, and
a file without a row is never looked at.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import InputError
from analysis.observations import ObservationId

if TYPE_CHECKING:
    from orchestrator.project import Project
    from trainers.models import KeptModel

DIRECTORY = "models"
SOME = 5
"""Keys or horizons that an error names."""


def file_name(name: ObservationId) -> str:
    """Where the model of an observation is, in the project's storage."""
    return f"{DIRECTORY}/{name[0]}-{name[1]}.safetensors"


def find_project(given: str | None) -> Project:
    """The project that a person named; else the one here, or the only one below `projects/`.

    Raises
    ------
    InputError
        If there is none, or several.
    """
    from orchestrator.project import PROJECTS, open_project

    if given is not None:
        return open_project(given)
    with suppress(InputError):
        return open_project(".")
    found = []
    for place in sorted(PROJECTS.glob("*")):
        with suppress(InputError):
            found.append(open_project(place))
    if len(found) != 1:
        there = f"{PROJECTS}/ has {_some([p.name for p in found])}" if found else "there is none"
        raise InputError(f"which project? {there}: name it with --project")
    return found[0]


def choose(project: Project, key: str, tokens: int | None) -> ObservationId:
    """The observation that a person named by the beginning of its key, and its horizon.

    Raises
    ------
    InputError
        If there is none in the ledger, or several. It names them, or near ones.
    """
    ids = sorted(project.ledger.ids())
    keys = sorted({name[0] for name in ids if name[0].startswith(key)}) if key else []
    if not keys:
        raise InputError(f"project {project.uri} has measured no trial {key!r}: {_near(key, ids)}")
    if len(keys) > 1:
        raise InputError(f"{key!r} begins {len(keys)} keys: {_some(keys)}; write more of it")
    horizons = [name[1] for name in ids if name[0] == keys[0]]
    if tokens is None and len(horizons) == 1:
        return keys[0], horizons[0]
    if tokens not in horizons:
        given = f"not at {tokens}" if tokens is not None else "each a model of its own"
        raise InputError(
            f"trial {keys[0]} was measured at {_some(horizons, 100)} tokens, {given}: "
            "choose one with --tokens"
        )
    return keys[0], tokens


def fetch(project: Project, name: ObservationId) -> KeptModel:
    """The model of an observation that is in the ledger.

    Raises
    ------
    InputError
        If none was kept, with the reason, or the file cannot be used.
    """
    from trainers.models import read_model

    storage, file = project.storage, file_name(name)
    if not storage.exists(file):
        raise InputError(f"the model of {name[0]} at {name[1]} tokens {_why_not(project, name)}")
    if storage.local is not None:
        return read_model(storage.local / file, file)
    with tempfile.TemporaryDirectory(prefix="isoflop-") as directory:
        path = Path(directory) / "model"
        storage.download(file, path)
        return read_model(path, storage.place(file))


def _why_not(project: Project, name: ObservationId) -> str:
    row = project.ledger.find(name) or {}
    if not str(row.get("trainer")).startswith("pretrain-"):
        return f"is not here: its trainer, {row.get('trainer')}, leaves none"
    if row.get("loss") is None:
        return f"was not kept, since its training diverged: {row.get('reason')}"
    return (
        "was not kept: its sweep has models = false in [checkpoints], or ran before models were "
        "kept, or somebody removed the file; to have it, run the sweep into another --project"
    )


def _near(key: str, ids: Sequence[ObservationId]) -> str:
    """What a person may have meant."""
    keys = sorted({name[0] for name in ids})
    if not keys:
        return "its ledger is empty"
    beginnings = {known[: len(key)]: known for known in keys}
    near = difflib.get_close_matches(key, beginnings, SOME, 0.6) if key else []
    if near:
        return f"near are {_some([beginnings[found] for found in near])}"
    return f"it has {_some(keys)}"


def _some(names: Sequence[object], most: int = SOME) -> str:
    shown = ", ".join(f"{name}" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
