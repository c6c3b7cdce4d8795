"""Where a project lies: small records by name, in a local or shared directory or an object store.

Knows nothing of what is in them. `objects.py` has the object stores; this has the contract, the
directories and the way from what a person wrote to a storage.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from analysis.errors import InputError

OBJECT_STORES = {"s3": "s3", "gs": "gcs"}
"""Schemes of object stores, with the extra of isoflop that each needs."""
LONGEST_WAIT = 10.0
"""Seconds between tries of a storage that fails."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""How file systems say that they have no hard links; want of permission is EACCES."""
NO_WAY_OUT = "remove the link, or move the whole project to where there is room"
"""What to do about a link that leads out of a project; the whole project may be a link."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # one slash too: Path drops the other

Result = TypeVar("Result")


class Refused(InputError, OSError):
    """A storage said no: to what a person gave, and as an `OSError` to who goes on without it."""


class Outside(Refused):
    """A link leads out of the storage, which no waiting mends."""


class Storage(ABC):
    """Whole small files by name, `<directory>/.../<file>`, for any number of processes at once.

    Contract: `create` and `replace` are atomic and durable: whoever reads, and whatever dies, sees
    a file whole or not at all, and a file that they returned from survives the death of every
    process (in a directory it is synced to disk). Of any number of processes that create one name,
    at most one is told True; the others find what it wrote. What was written is seen by every
    later `read`, `exists` and `names`, from every machine. Names whose last part begins with a dot
    are temporary: none is ever listed. A storage may be pickled and used after a fork.

    An operation raises `OSError` where it fails, `Refused` where that is for want of permission,
    credentials or a bucket.
    """

    uri: str
    """What a person calls it: a URI, or the absolute path of a directory."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def local(self) -> Path | None:
        """Its directory, where it is one."""
        return None

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @abstractmethod
    def make(self) -> None:
        """Make its directory, where it is one that is not there yet; nothing else does."""

    @abstractmethod
    def require_inside(self, directory: str) -> None:
        """Raise `Outside` if a directory of it is a link that leads out of it."""

    @abstractmethod
    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a file unless there is one of that name. False if there is.

        One that is not `durable` survives every process, but perhaps no power cut.

        On an object store False may also mean that an earlier try of this very call arrived and
        its answer was lost: who must know puts a random word into `data` and reads it back.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write a file, in place of the one of that name if there is one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """What is in a file; `FileNotFoundError` where there is none."""

    @abstractmethod
    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """What is in each of those files that are there, in the order of `names`."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """Return when a file was written, by the storage's own clock, in seconds since 1970.

        None where the storage does not tell.
        """

    @abstractmethod
    def names(self, directory: str, prefix: str = "") -> list[str]:
        """The files that lie directly in `directory` and begin with `prefix`, sorted, bare."""

    @abstractmethod
    def marks(self, directory: str, names: Collection[str]) -> dict[str, str]:
        """Return a short text for each of these files of a directory, by its bare name.

        Files of other content have other marks; a file that is not there has none. Marks of
        different storages do not compare.
        """

    @abstractmethod
    def beginning(self, name: str, size: int) -> bytes:
        """Return the first `size` bytes of a file, or all where it is shorter."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""

    @abstractmethod
    def remove_all(self, directory: str) -> None:
        """Remove all below `directory`, temporary files too; nothing where there is none."""

    @abstractmethod
    def upload(self, path: Path, name: str) -> None:
        """As `replace`, from a local file of any size."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Copy a file of any size to a local path, where it appears whole or not at all."""

    def place(self, name: str) -> str:
        """What a person calls one of its files."""
        return f"{self.uri}/{name}"


class LocalStorage(Storage):
    """A directory of this machine, or of a file system that several share.

    On NFS too: a hard link is what that creates atomically, and its count of links is what tells
    who made it when the answer was lost (link(2), and the note on O_EXCL in open(2)).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.uri = str(directory)

    @property
    def local(self) -> Path:
        """The directory itself."""
        return self._directory

    def require_inside(self, directory: str) -> None:
        """See `Storage`."""
        self._require_inside(self._directory / directory)

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        """See `Storage`."""
        path = self._directory / name
        with self._beside(path, lambda file: file.write(data), durable=durable) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if temporary.stat().st_nlink != 2:
                    return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise Refused(
                    f"{self.uri} is on a file system without hard links ({error.strerror}), which "
                    "a ledger needs: choose another with --project"
                ) from error
        if durable:
            _sync(path.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        self._put(name, lambda file: file.write(data))

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        path = self._directory / name
        # Opening somebody's named pipe would wait for ever, and some devices have no end.
        with _refusing(self.uri), open(path, "rb", opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(f"{path} is no regular file: remove it")
            return file.read()

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """See `Storage`."""
        found = {}
        for name in names:
            try:
                found[name] = self.read(name)
            except FileNotFoundError:
                continue
        return found

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        with _refusing(self.uri):
            return (self._directory / name).is_file()

    def modified(self, name: str) -> float:
        """See `Storage`."""
        with _refusing(self.uri):
            return (self._directory / name).stat().st_mtime

    def names(self, directory: str, prefix: str = "") -> list[str]:
        """See `Storage`."""
        try:
            with _refusing(self.uri), os.scandir(self._directory / directory) as entries:
                found = [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(n for n in found if n.startswith(prefix) and not n.startswith("."))

    def marks(self, directory: str, names: Collection[str]) -> dict[str, str]:
        """See `Storage`: hashes."""
        read = self.read_many(f"{directory}/{name}" for name in names)
        return {
            name.rpartition("/")[2]: f"sha256:{hashlib.sha256(data).hexdigest()}"
            for name, data in read.items()
        }

    def beginning(self, name: str, size: int) -> bytes:
        """See `Storage`."""
        with _refusing(self.uri), (self._directory / name).open("rb") as file:
            return file.read(size)

    def make(self) -> None:
        """See `Storage`."""
        with _refusing(self.uri):
            self._directory.mkdir(parents=True, exist_ok=True)

    def remove(self, name: str) -> None:
        """See `Storage`."""
        with _refusing(self.uri):
            (self._directory / name).unlink(missing_ok=True)

    def remove_all(self, directory: str) -> None:
        """See `Storage`."""
        with _refusing(self.uri), suppress(FileNotFoundError):
            path = self._directory / directory
            self._require_inside(path.parent)
            shutil.rmtree(path)

    def upload(self, path: Path, name: str) -> None:
        """See `Storage`."""
        with path.open("rb") as source:
            self._put(name, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def download(self, name: str, path: Path) -> None:
        """See `Storage`."""
        LocalStorage(path.parent).upload(self._directory / name, path.name)

    def _put(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self._directory / name
        with self._beside(path, write) as temporary:
            temporary.replace(path)
        _sync(path.parent)

    def _require_inside(self, place: Path) -> None:
        """Refuse a place below the directory that a link has moved out of it.

        Who can write to a project would have our files written, or removed, anywhere.
        """
        if place == self._directory:
            return
        where = place.resolve()
        if not where.is_relative_to(self._directory.resolve()):
            raise Outside(
                f"{place} is or lies in a symbolic link that leads out of the project, to {where}: "
                f"{NO_WAY_OUT}"
            )

    @contextmanager
    def _beside(
        self, path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = True
    ) -> Iterator[Path]:
        """A temporary file beside `path`, written, and synced if `durable`; gone afterwards."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with _refusing(self.uri):
            self._require_inside(path.parent)
            try:
                file = temporary.open("wb")
            except FileNotFoundError:
                # Not the directory itself: on a node whose share is gone, that is another disk.
                if not self._directory.is_dir():
                    raise
                path.parent.mkdir(parents=True, exist_ok=True)
                _sync(path.parent.parent)
                file = temporary.open("wb")
            try:
                with file:
                    write(file)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def __reduce__(self) -> tuple[object, ...]:
        return LocalStorage, (self._directory,)


@contextmanager
def _refusing(uri: str) -> Iterator[None]:
    """Say in one sentence that a file system does not permit something."""
    try:
        yield
    except Refused:
        raise
    except PermissionError as error:
        path = Path(error.filename or uri)
        place = path.parent if path.name.startswith(".") else path  # of a temporary file, its place
        raise Refused(f"no permission for {place} ({error.strerror})") from error


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _sync(directory: Path) -> None:
    """Make a new name in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_uri(location: str | Path) -> bool:
    """Whether a person gave a URI, also one that went through `Path` and lost a slash."""
    return _SCHEME.fullmatch(str(location)) is not None


def scheme_and_place(location: str | Path) -> tuple[str, str]:
    """The scheme of the storage that a person named, `file` for a path, and the place in it.

    Raises
    ------
    InputError
        If the scheme is none of file, s3 and gs, or no bucket is named.
    """
    found = _SCHEME.fullmatch(str(location))
    if found is None:
        return "file", str(Path(location).resolve())
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    if scheme == "file":
        return scheme, f"/{rest}"
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in ("file", *OBJECT_STORES))
        raise InputError(f"{location}: no storage is called {scheme}://; give a path, {known}")
    if not rest:
        raise InputError(f"{location} names no bucket: write {scheme}://BUCKET/PROJECT")
    return scheme, rest


def open_storage(location: str | Path) -> Storage:
    """The storage that a person named. Nothing is made, and nothing is asked of it yet.

    Raises
    ------
    InputError
        If the scheme is none of file, s3 and gs, no bucket is named, or what it needs is not
        installed.
    """
    scheme, place = scheme_and_place(location)
    if scheme == "file":
        return LocalStorage(Path(place))
    from orchestrator.objects import ObjectStorage

    return ObjectStorage(f"{scheme}://{place}")


def split(location: str | Path) -> tuple[Storage, str]:
    """A file that a person named: the storage that it lies in, and its name there."""
    if not is_uri(location):
        path = Path(location)
        if path.name in ("", ".."):  # a directory
            path = path.resolve()
        # A link is not followed, so that what is written takes its place.
        return LocalStorage(path.parent.resolve()), path.name
    parent, _, name = str(location).rpartition("/")
    return open_storage(parent), name


def prove(storage: Storage) -> None:
    """Make it, write for proof, and see that what is there is not written again. Once a run.

    Raises
    ------
    InputError
        If the storage cannot be written, or does not keep the promise on which the ledger rests.
    """
    name = f".proof-{uuid.uuid4().hex}"
    try:
        storage.make()
        created = storage.create(name, b"first")
        again = storage.create(name, b"second")
        kept = storage.read(name)
    except Refused as error:
        raise InputError(f"cannot write to the project: {error}") from error
    except OSError as error:
        raise InputError(
            f"cannot write to the project {storage.uri} ({reason_of(error)}): choose another with "
            "--project"
        ) from error
    finally:
        _try_to_remove(storage, name)
    if not created or again or kept != b"first":
        raise InputError(
            f"{storage.uri} writes a file over one that is there although it was told to create "
            "it: a ledger cannot lie there; use a store with conditional writes, such as AWS S3, "
            "or a file system with hard links"
        )


def reason_of(error: OSError) -> str:
    """Why, without the name of the file, which may be a temporary one."""
    return error.strerror or str(error)


def patiently(
    action: Callable[[], Result],
    *,
    tell: Callable[[OSError], None],
    unless: Callable[[], bool],
) -> Result:
    """Do something with a storage, however long it fails; `tell` each time why.

    Raises
    ------
    OSError
        The last one, once `unless` says that nobody wants it any more; `Outside` at once.
    """
    wait = 0.1
    while True:
        try:
            return action()
        except Outside:
            raise
        except OSError as error:
            if unless():
                raise
            tell(error)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def _try_to_remove(storage: Storage, name: str) -> None:
    try:
        storage.remove(name)
    except OSError:  # then it could not be written either, which is what is told
        return
