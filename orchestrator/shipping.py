"""What of a sweep travels to a cluster with its job: the sweep file and the files that it names."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import InputError
from cluster.package import is_hidden
from orchestrator.spec import SweepSpec, rooted, spec_as_written
from trainers.sources import named_files

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


def pack(sweep: Path, directory: Path | None = None) -> Shipment:
    """Return the sweep file, and those of its corpus, its command and its recipe beside it.

    Files that it names by an absolute path stay where they are: on storage that the cluster shares.

    Parameters
    ----------
    sweep
        The sweep file, which somebody else may have written.
    directory
        Where files may lie besides the sweep file's own directory.

    Raises
    ------
    InputError
        If the sweep cannot be read, is invalid, or names no file, or one that lies elsewhere, that
        a link leads to from there, or whose name begins with a dot.
    """
    written = spec_as_written(sweep)
    sweep = sweep.resolve()
    # Not resolved: the cluster must see the names that the globs are to match.
    named = [Path(os.path.normpath(path)) for path in _corpus_files(written, sweep)]
    spec = rooted(written, sweep)
    if spec.command is not None and written.command is not None:
        paths = spec.command.paths().values()
        here = not Path(written.command.directory).is_absolute()
        named += [Path(os.path.normpath(path)) for path in paths if here]
    recipe = sweep.parent / f"{spec.recipe.name.partition(':')[0]}.py"
    if ":" in spec.recipe.name and recipe.is_file():
        named.append(recipe)
    allowed = [sweep.parent, *([directory.resolve()] if directory is not None else [])]
    for path in named:
        _require_allowed(path, allowed)
    root = Path(os.path.commonpath([sweep.parent, *(path.parent for path in named)]))
    files = {f"{DIRECTORY}/{path.relative_to(root)}": path for path in [sweep, *named]}
    return Shipment(spec=spec, sweep=f"{DIRECTORY}/{sweep.relative_to(root)}", files=files)


def _require_allowed(path: Path, allowed: list[Path]) -> None:
    """Refuse a file that is not to travel, by its name or by where links lead."""
    for place in (path, path.resolve()):
        inside = [place.relative_to(top) for top in allowed if place.is_relative_to(top)]
        shown = f"{path}, a link to {place}," if place != path else f"{path},"
        if not inside:
            raise InputError(
                f"the sweep names {shown} which is not in {' or '.join(map(str, allowed))} and is "
                "not sent: name it by its absolute path on storage that all nodes share, or give "
                "--working-dir DIR, a directory that it is in and that is sent as a whole"
            )
        if all(map(is_hidden, inside)):
            raise InputError(
                f"the sweep names {shown} and files and directories whose names begin with a dot "
                "are never sent, since they hold keys: give it another name"
            )


def _corpus_files(written: SweepSpec, sweep: Path) -> list[str]:
    """The files of a sweep's corpus that it names by a relative path."""
    found: list[str] = []
    for pattern in named_files(written.corpus):
        if not Path(pattern).is_absolute():
            here = str(Path(glob.escape(str(sweep.parent))) / pattern)
            matched = [path for path in glob.iglob(here, recursive=True) if Path(path).is_file()]
            if not matched:
                raise InputError(f"no file matches {here}, the corpus of {sweep.name}")
            found += matched
    return sorted(set(found))
