"""What travels with a Ray job, in one file, and an account of what of it is the user's.

Nothing travels unasked: no file whose name begins with a dot, since such files hold keys, and none
outside of the directories that the user named, however links lead there.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import InputError
from analysis.wording import plural

USER_DIRECTORY = "user"
"""Place of the user's own directory in the job's working directory."""
MAX_BYTES = 64 << 20
"""Bytes of the files that a sweep names and that travel with its job. They go through the head's
memory to every node."""
LEFT_OUT = frozenset(("venv", "__pycache__"))
"""Names in the user's directory that Ray leaves out, too, besides those that begin with a dot."""
_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every file in a package: equal content is then an equal package, which Ray keeps."""

Rule = Callable[[Path], bool]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A job's files, packed."""

    path: Path
    """The zip file."""
    files: tuple[tuple[str, int], ...]
    """Places and sizes, in bytes, of the files that are not isoflop's own."""

    @property
    def summary(self) -> str:
        """Sentence with the number of files that are sent, their size and the largest of them."""
        sizes = [size for _, size in self.files]
        text = f"{plural(len(sizes), 'file')} of yours, {sum(sizes):,} bytes"
        if len(sizes) > 1:
            place, size = max(self.files, key=lambda file: file[1])
            text += f" (the largest is {place}, {size:,} bytes)"
        return text


@contextmanager
def packed(
    *, packages: Sequence[Path], files: Mapping[str, Path], directory: Path | None = None
) -> Iterator[Package]:
    """Pack the working directory of a job; the file is gone when the block is left.

    Parameters
    ----------
    packages
        Directories of Python packages, which come first on the job's import path.
    files
        Place in the job's working directory -> local file.
    directory
        The user's own, to be found at `USER_DIRECTORY`, without what its .gitignore names.

    Raises
    ------
    InputError
        If the files are too large or cannot be read, or a link in the user's directory leads out of
        it.
    """
    large = sum(path.stat().st_size for path in files.values())
    if large > MAX_BYTES:
        raise InputError(
            f"the files that the sweep names have {large / 1e6:,.0f} MB, more than the "
            f"{MAX_BYTES / 1e6:,.0f} MB that travel with a job: put them on storage that all nodes "
            "share and name them by their absolute path there"
        )
    own = dict(files)
    if directory is not None:
        own |= {f"{USER_DIRECTORY}/{name}": path for name, path in own_files(directory)}
    with tempfile.TemporaryDirectory(prefix="isoflop-job-") as name:
        path = Path(name) / "job.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for package in packages:
                for file in sorted(package.rglob("*")):
                    if file.is_file() and "__pycache__" not in file.parts:
                        _add(archive, f"{package.name}/{file.relative_to(package)}", file)
            if directory is not None:
                archive.writestr(zipfile.ZipInfo(f"{USER_DIRECTORY}/", _TIME), b"")
            sizes = tuple((place, _add(archive, place, file)) for place, file in own.items())
        yield Package(path=path, files=sizes)


def own_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a user's directory that travel, with their names relative to it.

    Raises
    ------
    InputError
        If a link leads out of the directory, or to a file that never travels.
    """
    root = directory.resolve()
    for path in _walk(root, root, (), (root,)):
        yield path.relative_to(root).as_posix(), path


def is_hidden(path: Path) -> bool:
    """Return whether a part of a relative path begins with a dot: such files hold keys."""
    return any(part.startswith(".") for part in path.parts)


def _walk(
    root: Path, directory: Path, rules: tuple[Rule, ...], above: tuple[Path, ...]
) -> Iterator[Path]:
    rules = (*rules, *_ignore_rules(directory))
    for entry in sorted(directory.iterdir()):
        named = entry.name.startswith(".") or entry.name in LEFT_OUT
        if named or any(leaves_out(entry) for leaves_out in rules):
            continue
        target = entry.resolve()
        if not target.is_relative_to(root) or is_hidden(target.relative_to(root)):
            raise InputError(
                f"{entry} leads to {target}, which is not to be sent with --working-dir {root}: "
                "remove the link, or name it in a .gitignore there"
            )
        if entry.is_dir():
            if target not in above:  # a link to a directory that it lies in
                yield from _walk(root, entry, rules, (*above, target))
        elif entry.is_file():
            yield entry


def _ignore_rules(directory: Path) -> Sequence[Rule]:
    """Return what the .gitignore and .rayignore of a directory leave out, as Ray reads them."""
    try:
        from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
    except ImportError as error:  # it is no public part of Ray
        raise InputError(
            f"this Ray cannot tell what a .gitignore leaves out ({error}), and --working-dir would "
            "send too much: leave it out, or use the Ray of constraints.txt"
        ) from error
    rules: list[Rule] = get_excludes_from_ignore_files(directory, include_gitignore=True)
    return rules


def _add(archive: zipfile.ZipFile, place: str, path: Path) -> int:
    """Write a file into the package; return its size in bytes."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        info = zipfile.ZipInfo(place, _TIME)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = (stat.S_IFREG | 0o600 | mode & 0o755) << 16
        with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return info.file_size
