"""What of a sweep travels to a cluster with its job: the sweep file and the files that it names."""

from __future__ import annotations

import glob
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import InputError
from orchestrator.spec import SweepSpec, read_spec
from trainers.corpus import Files

DIRECTORY = "files"
"""Where they are, in the job's working directory."""


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """A sweep, ready to travel."""

    spec: SweepSpec
    sweep: str
    """Place of the sweep file in the job's working directory."""
    files: dict[str, Path]
    """Place -> local file, the sweep's own among them; they lie to each other as they do here."""


def pack(sweep: Path) -> Shipment:
    """The sweep file and the corpus files that it names relative to itself.

    Files that it names by an absolute path stay where they are: on storage that the cluster shares.

    Raises
    ------
    InputError
        If the sweep cannot be read, is invalid, or names no file.
    """
    spec = read_spec(sweep)
    sweep = sweep.resolve()
    named = []
    if isinstance(spec.corpus, Files) and not Path(_glob_as_written(sweep)).is_absolute():
        # Not resolved: the cluster must see the names that the glob is to match.
        found = glob.iglob(spec.corpus.glob, recursive=True)
        named = [Path(os.path.normpath(path)) for path in found if Path(path).is_file()]
        if not named:
            raise InputError(f"no file matches {spec.corpus.glob}, the corpus of {sweep.name}")
    root = Path(os.path.commonpath([sweep.parent, *(path.parent for path in named)]))
    files = {f"{DIRECTORY}/{path.relative_to(root)}": path for path in [sweep, *named]}
    return Shipment(spec=spec, sweep=f"{DIRECTORY}/{sweep.relative_to(root)}", files=files)


def _glob_as_written(sweep: Path) -> str:
    """The corpus glob of a valid sweep file, which `read_spec` makes absolute."""
    return str(tomllib.loads(sweep.read_text())["corpus"]["glob"])
