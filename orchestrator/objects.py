"""Object stores as storage: s3:// and gs://, through fsspec.

Credentials, region and endpoint come from the environment, as for every tool of those stores
(AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from analysis.errors import InputError, first_line
from orchestrator.storage import OBJECT_STORES, Refused, Storage

UNREACHABLE = ("Timeout", "Connect", "Connection", "HTTPClient", "Payload", "Disconnected")
"""Parts of names of errors that may be gone at the next try."""
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")
"""Packages whose errors are not `OSError`s, as those of fsspec's interface should be."""
BOUNDS: dict[str, dict[str, Any]] = {
    # s3fs itself tries 5 times, 5 s to connect and 15 s for an answer; botocore below it once.
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}},
    "gs": {"requests_timeout": 15},  # gcsfs tries 6 times
}
"""So that no call takes longer than about two minutes: whoever called tries again, and says so."""
CONFLICTS = 10
"""Tries of a conditional write that meets another one in flight, which S3 answers with 409."""


class ObjectStorage(Storage):
    """A bucket, or a part of one below a prefix. See `Storage` for what it promises.

    `create` is a conditional PUT: If-None-Match in s3fs, ifGenerationMatch=0 in gcsfs. Listings
    are never cached: a stale one would hide what others wrote.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._scheme, _, self._root = uri.partition("://")
        self._connected: tuple[int, Any] | None = None
        self._connect()

    def make(self) -> None:
        """See `Storage`: a bucket is not made."""

    def require_inside(self, directory: str) -> None:
        """See `Storage`: there are no links."""

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        """See `Storage`."""
        with self._telling("write"):
            for number in range(CONFLICTS):
                try:
                    self._connect().pipe_file(self._path(name), data, mode="create")
                except FileExistsError:
                    return False
                except FileNotFoundError as error:
                    raise self._no_bucket() from error
                except OSError as error:
                    if _code(error) != "ConditionalRequestConflict" or number == CONFLICTS - 1:
                        raise
                    time.sleep(0.05 * 2**number)
                else:
                    return True
        raise AssertionError("unreachable")

    def replace(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        with self._telling("write"):
            self._connect().pipe_file(self._path(name), data)

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        with self._telling("read"):
            return bytes(self._connect().cat_file(self._path(name)))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """See `Storage`. Many at once."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with self._telling("read"):
            read = self._connect().cat(list(paths), on_error="return")
            found = {}
            for path, name in paths.items():
                if isinstance(read[path], FileNotFoundError):
                    continue
                if isinstance(read[path], Exception):
                    raise read[path]
                found[name] = bytes(read[path])
        return found

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        with self._telling("read"):
            try:
                return bool(self._connect().info(self._path(name))["type"] == "file")
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return False

    def modified(self, name: str) -> float | None:
        """See `Storage`."""
        with self._telling("read"):
            found = self._connect().info(self._path(name))
        moment = found.get("LastModified") or found.get("mtime")  # s3fs; gcsfs
        return moment.timestamp() if isinstance(moment, datetime) else None

    def names(self, directory: str, prefix: str = "") -> list[str]:
        """See `Storage`."""
        base = self._path(directory)
        with self._telling("list"):
            found = self._connect().find(base, prefix=prefix)
        names = (path.removeprefix(f"{base}/") for path in found)
        return sorted(n for n in names if "/" not in n and n and not n.startswith("."))

    def marks(self, directory: str, names: Collection[str]) -> dict[str, str]:
        """See `Storage`: what the store says in a listing, so that no file is fetched."""
        base, wanted = self._path(directory), set(names)
        with self._telling("list"):
            listed = self._connect().find(base, detail=True)
        told = {path.removeprefix(f"{base}/"): _mark(info) for path, info in listed.items()}
        return {name: mark for name, mark in told.items() if mark is not None and name in wanted}

    def beginning(self, name: str, size: int) -> bytes:
        """See `Storage`."""
        with self._telling("read"):
            return bytes(self._connect().cat_file(self._path(name), start=0, end=size))

    def remove(self, name: str) -> None:
        """See `Storage`."""
        with self._telling("remove from"):
            try:
                self._connect().rm_file(self._path(name))
            except FileNotFoundError:
                return

    def remove_all(self, directory: str) -> None:
        """See `Storage`."""
        with self._telling("remove from"), suppress(FileNotFoundError):
            self._connect().rm(self._path(directory), recursive=True)

    def upload(self, path: Path, name: str) -> None:
        """See `Storage`."""
        with self._telling("write"):
            self._connect().put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """See `Storage`."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with self._telling("read"):
                self._connect().get_file(self._path(name), str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _connect(self) -> Any:
        """The file system of this process: sockets and threads do not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            import fsspec

            try:
                # Its caching of instances is by thread; ours is shared by the driver's threads.
                bounds = BOUNDS[self._scheme]
                made = fsspec.filesystem(self._scheme, use_listings_cache=False, **bounds)
            except ImportError as error:
                extra = OBJECT_STORES[self._scheme]
                raise InputError(
                    f"{self.uri} needs a package that is not installed: "
                    f"pip install 'isoflop[{extra}]'"
                ) from error
            self._connected = (os.getpid(), made)
        return self._connected[1]

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Say in one sentence what the store does not allow, and make its errors `OSError`s."""
        try:
            yield
        except Refused:
            raise
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._no_bucket() from error
            raise
        except OSError as error:
            if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
                raise Refused(
                    f"no permission to {what} {self.uri} ({first_line(error)}): "
                    "check the credentials in the environment and the bucket's policy"
                ) from error
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in CLIENTS:
                raise
            if any(word in type(error).__name__ for word in UNREACHABLE):
                raise OSError(
                    f"cannot {what} {self.uri} ({first_line(error)}): no answer from the endpoint"
                ) from error
            raise Refused(
                f"cannot {what} {self.uri} ({first_line(error)}): "
                "check the credentials and the endpoint in the environment"
            ) from error

    def _no_bucket(self) -> Refused:
        bucket = self._root.partition("/")[0]
        return Refused(f"{self.uri}: there is no bucket {bucket!r}; create it or correct the URI")

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectStorage, (self.uri,)


def _mark(info: Mapping[str, Any]) -> str | None:
    """Return what a listing says of an object's content: S3's ETag, or the MD5 of Google's."""
    for name in ("ETag", "md5Hash", "etag"):
        if info.get(name):
            return f"{name}:{info[name]}"
    return None


def _code(error: BaseException) -> str | None:
    """What the store itself called an error that fsspec translated."""
    answer = getattr(error.__cause__, "response", None) or {}
    code = answer.get("Error", {}).get("Code")
    return None if code is None else str(code)
