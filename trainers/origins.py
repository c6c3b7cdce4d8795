"""What text is read from: files, or a dataset as a stream. Each is documents to be stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from analysis.errors import InputError
from trainers.documents import content_hashes, document, files, kind_of, no_column, stamp, units
from trainers.joining import Need
from trainers.shards import Unit
from trainers.sources import HuggingFace, Mixture, TextSource, TokenizerSource, describe
from trainers.store import STORE_VERSION, cache, digest
from trainers.tokenizer import INSTALL, pretrained

STREAMED_BYTES = 4 << 20
"""Text of a dataset that is given to a process at a time; less where little of it is taken."""

SAMPLE_VERSION = 2
"""Raise it whenever a tokenizer is trained on other documents of the same corpus."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Documents that are to be a store of their own."""

    name: str
    column: str
    identity: str
    """Equal for equal documents."""
    units: Callable[[], Iterator[Unit]]
    unchanged: Callable[[], None]
    """Raises if the files are no longer those of the identity."""
    size: int | None
    """Of its files in bytes; None where it is a stream."""
    need: Need | None = None
    """What to take of a stream."""


def origins_of(source: TextSource) -> list[Origin]:
    """What a source, or each part of a mixture, is read from."""
    parts = source.parts if isinstance(source, Mixture) else (source,)
    return [
        _streamed(part)
        if isinstance(part, HuggingFace)
        else _files(part.glob, part.column, describe(part))
        for part in parts
    ]


def heldout_origins(source: TextSource) -> dict[str, Origin]:
    """What the named held-out sets are read from."""
    column = source.parts[0].column if isinstance(source, Mixture) else source.column
    return {
        name: _files(glob, column, f"held-out {name}")
        for name, glob in sorted(source.heldout.items())
    }


def _files(glob: str, column: str, name: str) -> Origin:
    paths = files(glob)
    stamps = [stamp(path) for path in paths]
    hashes = content_hashes(paths, cache() / "hashes")
    contents = [(kind_of(path), found) for path, found in zip(paths, hashes, strict=True)]

    def unchanged() -> None:
        for path, before in zip(paths, stamps, strict=True):
            if stamp(path) != before:
                raise InputError(
                    f"{path} changed while it was tokenised: wait until nobody writes it"
                )

    return Origin(
        name=name,
        column=column,
        identity=digest([column, contents]),
        units=partial(_units, paths, column),
        unchanged=unchanged,
        size=sum(size for size, _ in stamps),
    )


def _units(paths: Sequence[Path], column: str) -> Iterator[Unit]:
    for spans in units(paths, column):
        yield Unit(spans=spans, size=sum(span.size for span in spans))


def _streamed(source: HuggingFace) -> Origin:
    return Origin(
        name=describe(source),
        column=source.column,
        identity=declared_hash(source),
        units=partial(_stream, source),
        unchanged=lambda: None,
        size=None,
        need=Need(tokens=source.tokens, train_tokens=source.declared_train_tokens),
    )


def _stream(source: HuggingFace) -> Iterator[Unit]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{describe(source)} is read by `datasets`, which is not installed here: {INSTALL}"
        ) from error
    if not source.is_directory and Path(source.dataset).exists():
        raise InputError(
            f"the dataset {source.dataset} is one on the hub, but its library would read what is "
            f"at {Path(source.dataset).absolute()}: write ./{source.dataset} if that is meant, "
            "else run it in another directory"
        )
    with _naming(source):
        rows = iter(
            load_dataset(
                source.dataset,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=True,
            )
        )
        first = list(islice(rows, 1))  # only then does it look into its files
    texts: list[bytes] = []
    size = 0
    enough = min(STREAMED_BYTES, source.tokens // 64)
    for number, row in enumerate(chain(first, rows), 1):
        texts.append(_text(source, row, number))
        size += len(texts[-1])
        if size >= enough:
            yield Unit(texts=tuple(texts), size=size)
            texts, size = [], 0
    if texts:
        yield Unit(texts=tuple(texts), size=size)


class UnreachableError(InputError, OSError):
    """A dataset that is not to be had now; a trial may try again."""


@contextmanager
def _naming(source: HuggingFace) -> Iterator[None]:
    """Say of which dataset an error of its library is, and what was asked of it."""
    try:
        yield
    except Exception as error:  # the library raises whatever its readers and the hub do
        of = [("config", source.config), ("split", source.split), ("revision", source.revision)]
        asked = ", ".join(f"{name} {value!r}" for name, value in of if value is not None)
        said = " ".join(str(error).split()) or type(error).__name__
        away = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (UnreachableError if away else InputError)(
            f"cannot read the dataset {source.dataset} ({asked}): {said}"
            + ("" if source.is_directory else "; a directory's path begins with ./ or /")
        ) from error


def _text(source: HuggingFace, row: dict[str, Any], number: int) -> bytes:
    name = describe(source)
    if source.column not in row:
        raise InputError(no_column(name, source.column, row))
    return document(row[source.column], source.column, lambda: f"{name} row {number}").text


def declared_hash(source: HuggingFace) -> str:
    """The hash by which a dataset is known before it is downloaded.

    Files that it names count by their content. Those of a dataset in a directory count by their
    paths there as well, which tell its library the split and the order.
    """
    declared: dict[str, Any] = {"store": STORE_VERSION}
    for item in dataclasses.fields(source):
        value = getattr(source, item.name)
        if item.name not in ("name", "weight", "heldout", "tokenizer") and value != item.default:
            declared[item.name] = value
    declared["heldout"] = [(o.name, o.identity) for o in heldout_origins(source).values()]
    choice = source.tokenizer
    if isinstance(choice, TokenizerSource):
        declared["tokenizer"] = (
            pretrained(choice).identity if choice.file else dataclasses.asdict(choice)
        )
        if choice.train is not None:
            declared["sample"] = SAMPLE_VERSION
    if source.is_directory:
        if not Path(source.dataset).is_dir():
            raise InputError(f"there is no directory {source.dataset}, which a corpus names")
        inside = sorted(path for path in Path(source.dataset).rglob("*") if path.is_file())
        names = [path.relative_to(source.dataset).as_posix() for path in inside]
        hashes = content_hashes(inside, cache() / "hashes")
        declared["dataset"] = list(zip(names, hashes, strict=True))
    return digest(declared)[:16]
