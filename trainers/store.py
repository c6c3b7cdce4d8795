"""Where tokens lie on a machine: one directory a corpus, made once, whole or not at all.

Promises: a directory without `.tmp` in its name was finished and renamed into place in one step; of
processes that want the same one at once, one makes it and the others wait for it; what a killed one
left is removed by the next; files that are not as their manifest says are made again. Short files
are hashed whenever they are opened, long ones once a machine, and again when they were written.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.visible import visible
from trainers.batches import Tokens
from trainers.documents import content_hashes, file_hash

STORE_VERSION = 2
"""Raise it whenever the same text would be stored as something else."""
HASHED_BYTES = 64 << 20
"""Files up to this length are hashed whenever they are opened; hashes of longer ones are remembered
by path, size and time of change."""
STALE_SECONDS = 7 * 86400
"""After this a temporary directory of another machine, on a file system that is shared, is left
over from one that died."""
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
DOCUMENT = np.dtype([("start", "<i8"), ("hash", "<u8")])
"""A held-out document: its first token, and the hash of its text."""
TRAINED = np.dtype("<u8")
"""The hash of a training document's text."""
LISTS = ("heldout.npy", "trained.bin", "counts.npy")
"""Files of a store beside its tokens: held-out documents, training documents, symbols."""
MOST_LOST = 0.01
"""Share of text that may not come back from its tokens where bits a byte are still told: a
tokenizer that composes characters (NFC) changes some, and loses nothing by it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a manifest says of the training or the held-out part."""

    tokens: int
    documents: int
    """Pieces of long text files count on their own."""
    bytes: int
    """Of text, the end of a document counted as one."""
    hash: str
    """SHA-256 of the file."""

    @property
    def bytes_per_token(self) -> float:
        """Zero where there are no tokens."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds; the last file to be written."""

    version: int
    tokenizer: str
    """Identity of the tokenizer."""
    vocabulary: int
    """Symbols."""
    dtype: str
    """Of the tokens in the files, in NumPy's notation."""
    train: Part
    heldout: Part
    empty: int
    """Documents without text, which are left out."""
    left_out: int
    """Documents that are held out elsewhere, and therefore not here, or not trained on."""
    lost: float
    """Share of the text, as far as it was looked at, in lines that tokens do not give back."""
    lists: dict[str, str]
    """SHA-256 of each of `LISTS`."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """A stored corpus, its tokens mapped into memory."""

    manifest: Manifest
    train: Tokens
    heldout: Tokens
    documents: NDArray[np.void]
    """The held-out ones, of type `DOCUMENT`."""
    trained: NDArray[np.uint64]
    """Hashes of the training documents, ascending, mapped into memory."""
    counts: NDArray[np.int64]
    """How often each symbol occurs in the training part."""

    @property
    def bytes_per_token(self) -> float | None:
        """Of the held-out part; None where tokens lose text."""
        found = self.manifest
        return None if found.lost > MOST_LOST else found.heldout.bytes_per_token


class UnusableError(Exception):
    """There is no store, or it is not as its manifest says; the message says in which way."""


def cache() -> Path:
    """`$ISOFLOP_CACHE`, else `~/.cache/isoflop`."""
    return Path(os.environ.get("ISOFLOP_CACHE") or Path.home() / ".cache" / "isoflop")


def digest(content: Any) -> str:
    """SHA-256 of JSON-ready content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ensure(identity: str, make: Callable[[Path], None]) -> Store:
    """The store of that name; `make` fills a directory with it where there is none.

    Raises
    ------
    InputError
        If the disk is full or may not be written, and whatever `make` raises.
    """
    place = cache() / "corpora" / identity
    try:
        return open_store(place)
    except UnusableError:
        pass
    with writing(place), locked(place, "tokenises this corpus"):
        try:
            return open_store(place)
        except UnusableError as error:
            _clear(place, str(error))
        _make(place, make)
        return open_store(place)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Make the directory of `place`; that it cannot be written is the user's to mend."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or not _is_near(error.filename, place.parent):
            raise
        raise InputError(
            f"cannot store tokens in {place.parent}: {error.strerror}; give it room, or set "
            "ISOFLOP_CACHE to another directory"
        ) from error


def _is_near(name: str | None, place: Path) -> bool:
    """Whether an error is of what is at a place or above, rather than of the text that is read."""
    if name is None:
        return True
    return Path(name).is_relative_to(place) or place.is_relative_to(name)


def open_store(place: Path) -> Store:
    """The store at `place`.

    Raises
    ------
    UnusableError
        If it is not there, or not as its manifest says.
    """
    try:
        manifest = _manifest(json.loads((place / "manifest.json").read_text()))
        dtype = np.dtype(manifest.dtype)
        for name in LISTS:
            _verify(place / name, manifest.lists[name])
        documents = np.load(place / "heldout.npy")
        counts = np.load(place / "counts.npy")
        trained = _mapped(place / "trained.bin", TRAINED, manifest.train.documents)
        train = _mapped(place / "train.bin", dtype, manifest.train.tokens)
        heldout = _mapped(place / "heldout.bin", dtype, manifest.heldout.tokens)
        _verify(place / "train.bin", manifest.train.hash)
        _verify(place / "heldout.bin", manifest.heldout.hash)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnusableError(f"has no {Path(error.filename).name}") from error
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise UnusableError(f"cannot be read ({error})") from error
    if len(documents) != manifest.heldout.documents or len(counts) != manifest.vocabulary:
        raise UnusableError("has other documents or symbols than its manifest says")
    return Store(
        manifest=manifest,
        train=train,
        heldout=heldout,
        documents=documents,
        trained=trained,
        counts=counts,
    )


def write_manifest(place: Path, manifest: Manifest) -> None:
    """Write the last file of a store."""
    content: dict[str, Any] = dataclasses.asdict(manifest)
    for name in ("train", "heldout"):  # for people, who would else divide
        content[name]["bytes_per_token"] = getattr(manifest, name).bytes_per_token
    (place / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def _manifest(content: dict[str, Any]) -> Manifest:
    if content["version"] != STORE_VERSION:
        raise ValueError(f"version {content['version']}, not {STORE_VERSION}")
    parts = {
        name: Part(**{key: value for key, value in part.items() if key != "bytes_per_token"})
        for name, part in content.items()
        if name in ("train", "heldout")
    }
    return Manifest(**{**content, **parts})


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    size, wanted = path.stat().st_size, length * dtype.itemsize
    if size != wanted:
        raise UnusableError(f"has {path.name} with {size:,} bytes, not {wanted:,}")
    if not size:  # nothing that could be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _verify(path: Path, wanted: str) -> None:
    if path.stat().st_size > HASHED_BYTES:
        (found,) = content_hashes([path], cache() / "hashes")
    else:
        found = file_hash(path)
    if found != wanted:
        raise UnusableError(f"has {path.name} with another hash than its manifest says")


@contextmanager
def locked(place: Path, doing: str) -> Iterator[None]:
    """Let one process of this machine at a time make what is at `place`; `doing` is for people."""
    lock = FileLock(place.with_name(f"{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"isoflop: another process {visible(doing)}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(place: Path, make: Callable[[Path], None]) -> None:
    draft = place.with_name(f"{place.name}.{_host()}-{os.getpid()}.tmp")
    draft.mkdir()
    try:
        make(draft)
        for path in [*draft.iterdir(), draft]:
            _sync(path)
        os.rename(draft, place)
    except OSError as error:
        # A machine that shares this file system, where locks may not reach, was first.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(place: Path, reason: str) -> None:
    """Remove a store that is not as it should be, and what killed processes left."""
    if place.exists():
        print(f"isoflop: {visible(f'{place} {reason}')}; tokenising again", file=sys.stderr)
        # Renamed first: who has it mapped keeps it, and nobody opens half of it.
        doomed = place.with_name(f"{place.name}.{_host()}-{os.getpid()}.old.tmp")
        os.rename(place, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for draft in place.parent.glob("*.tmp"):
        if draft.name.startswith(f"{place.name}.{_host()}-") or _abandoned(draft):
            shutil.rmtree(draft, ignore_errors=True)


def _abandoned(draft: Path) -> bool:
    name, _, maker = draft.name.partition(".")
    try:
        if not maker.startswith(f"{_host()}-"):
            return time.time() - draft.stat().st_mtime > STALE_SECONDS
        with FileLock(draft.with_name(f"{name}.lock"), timeout=0):
            return True
    except (Timeout, FileNotFoundError):
        return False


def _host() -> str:
    return socket.gethostname()
