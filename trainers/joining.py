"""Tokenised units to one store: what is held out of them is decided, and their files are joined.

Reads the files that `trainers.shards` writes, a few at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError
from trainers.batches import count_symbols
from trainers.documents import file_hash
from trainers.holdout import LEVELS, Split, decide, levels
from trainers.sources import LEAST_TOKENS
from trainers.store import (
    DOCUMENT,
    LISTS,
    STORE_VERSION,
    TRAINED,
    Manifest,
    Part,
    write_manifest,
)
from trainers.tokenizer import Tokenizer

JOINED_TOKENS = 4 << 20
"""Tokens in memory at a time when files are joined."""
RECORD = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""A document of a unit, in the order of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """How many tokens to take of documents that are more than that."""

    tokens: int
    train_tokens: int


@dataclass(frozen=True)
class Seen:
    """What a process saw in its documents, besides their records."""

    empty: int = 0
    """Documents without text."""
    checked: int = 0
    """Bytes of which it was seen whether they come back from their tokens..."""
    lost: int = 0
    """...and of lines that did not."""

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.empty + other.empty, self.checked + other.checked, self.lost + other.lost)


class Taken:
    """The units that are tokenised, in order, and what is known of their documents."""

    def __init__(
        self, *, excluded: NDArray[np.uint64], untrained: NDArray[np.uint64], all_heldout: bool
    ) -> None:
        self.excluded = excluded
        self.untrained = untrained
        self.all_heldout = all_heldout
        self.places: list[Path] = []
        self.seen = Seen()
        self._bytes = np.zeros(LEVELS)
        self._tokens = np.zeros(LEVELS)
        self._untrained = np.zeros(LEVELS)

    def add(self, place: Path, seen: Seen) -> None:
        """Count one more unit."""
        self.places.append(place)
        self.seen += seen
        records = self.kept(place)
        level = levels(records["hash"])
        self._bytes += np.bincount(level, records["bytes"], LEVELS)
        self._tokens += np.bincount(level, records["tokens"], LEVELS)
        tokens = np.where(np.isin(records["hash"], self.untrained), records["tokens"], 0)
        self._untrained += np.bincount(level, tokens, LEVELS)

    def kept(self, place: Path) -> NDArray[Any]:
        """Records of a unit's documents that are not excluded."""
        records = records_of(place)
        return records[~np.isin(records["hash"], self.excluded)]

    def split(self) -> Split:
        """What to hold out of all."""
        return Split(0, self.excluded[:0]) if self.all_heldout else decide(self._bytes, self._all)

    def satisfies(self, need: Need) -> bool:
        """Whether there are as many tokens, of all and to train on."""
        total = self._tokens.sum()
        if total < need.tokens:
            return False
        found = self.split()
        held = self._tokens[found.level :].sum() + self._untrained[: found.level].sum()
        if len(found.chosen):
            records = np.concatenate([self.kept(place) for place in self.places])
            hashes = records["hash"]
            held = records["tokens"][found.heldout(hashes) | np.isin(hashes, self.untrained)].sum()
        return bool(total - held >= need.train_tokens)

    def refuse_too_few(self, name: str, need: Need | None) -> None:
        """Raise if all there is is not enough."""
        total = int(self._tokens.sum())
        if need is not None:
            raise InputError(
                f"{name} has {total:,} tokens of text, fewer than the tokens = {need.tokens:,} "
                "that the sweep declares, or too few of them to train on: lower that"
            )
        if total < LEAST_TOKENS and not self.all_heldout:
            raise InputError(
                f"corpus {name} has {total:,} tokens, fewer than the {LEAST_TOKENS:,} that it "
                "takes to hold out a part of it: give it more text"
            )
        if not self.all_heldout and not self.split().heldout(self._all()[0]).any():
            raise InputError(
                f"corpus {name} has so few documents, or so long ones, that none can be held out: "
                "give it more"
            )

    def _all(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        records = np.concatenate([self.kept(place) for place in self.places])
        return records["hash"], records["bytes"]


def records_of(place: Path) -> NDArray[Any]:
    """What a unit's process wrote of its documents."""
    return np.fromfile(place.with_suffix(".records"), RECORD)


def join(place: Path, taken: Taken, tokenizer: Tokenizer) -> None:
    """Write the parts and the manifest from the units' files, which are removed."""
    train = _Growing(place / "train.bin", tokenizer)
    heldout = _Growing(place / "heldout.bin", tokenizer)
    with (place / "trained.bin").open("wb") as trained:
        held, left_out = _distribute(taken, train, heldout, trained)
    for leftover in place.glob("unit-*"):  # begun before it was known that there is enough
        leftover.unlink()
    _sort(place / "trained.bin")
    np.save(place / "heldout.npy", held)
    np.save(place / "counts.npy", train.counts)
    if tokenizer.definition is not None:
        (place / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    manifest = Manifest(
        version=STORE_VERSION,
        tokenizer=tokenizer.identity,
        vocabulary=tokenizer.vocabulary,
        dtype=tokenizer.dtype.str,
        train=train.part(),
        heldout=heldout.part(),
        empty=taken.seen.empty,
        left_out=left_out,
        lost=taken.seen.lost / max(1, taken.seen.checked),
        lists={name: file_hash(place / name) for name in LISTS},
    )
    write_manifest(place, manifest)


def _distribute(
    taken: Taken, train: _Growing, heldout: _Growing, trained: BinaryIO
) -> tuple[NDArray[Any], int]:
    """Each document to its part; gives those held out, and how many are in none.

    Hashes of those that are trained on go to the file `trained`.
    """
    found = taken.split()
    placed, left_out = [np.empty(0, DOCUMENT)], 0
    for unit in taken.places:
        tokens = unit.with_suffix(".tokens")
        with tokens.open("rb") as file:
            for records in _slices(records_of(unit)):
                data = np.fromfile(file, train.dtype, int(records["tokens"].sum()))
                hashes = records["hash"]
                drop = np.isin(hashes, taken.excluded)
                held = found.heldout(hashes) & ~drop
                drop |= np.isin(hashes, taken.untrained) & ~held
                placed.append(_placed(records[held], heldout.tokens))
                heldout.add(data, records, held)
                train.add(data, records, ~held & ~drop)
                trained.write(hashes[~held & ~drop].astype(TRAINED).tobytes())
                left_out += int(drop.sum())
        tokens.unlink()
        unit.with_suffix(".records").unlink()
    return np.concatenate(placed), left_out


def _sort(path: Path) -> None:
    """Sort hashes in their file, which may be larger than memory."""
    if path.stat().st_size:
        hashes = np.memmap(path, TRAINED, mode="r+")
        hashes.sort()
        hashes.flush()


def _slices(records: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Records of about `JOINED_TOKENS` at a time."""
    number = records["tokens"].cumsum() // JOINED_TOKENS
    return iter(np.split(records, np.flatnonzero(np.diff(number)) + 1))


def _placed(records: NDArray[Any], first: int) -> NDArray[Any]:
    """Documents of those records, the first of which begins at token `first`."""
    made = np.empty(len(records), DOCUMENT)
    made["start"] = first + records["tokens"].cumsum() - records["tokens"]
    made["hash"] = records["hash"]
    return made


class _Growing:
    """A part of a corpus that is being written."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.dtype = tokenizer.dtype
        self.counts = np.zeros(tokenizer.vocabulary, dtype=np.int64)
        self.tokens = self._documents = self._bytes = 0

    def add(self, data: NDArray[Any], records: NDArray[Any], mine: NDArray[np.bool_]) -> None:
        """Append those documents of `data` that are `mine`."""
        if not mine.all():
            data = data[np.repeat(mine, records["tokens"])]
        self._file.write(data.data)
        self._digest.update(data.data)
        self.counts += count_symbols(data, len(self.counts))
        self.tokens += len(data)
        self._documents += int(mine.sum())
        self._bytes += int(records["bytes"][mine].sum())

    def part(self) -> Part:
        """Close it, and say what it holds."""
        self._file.close()
        return Part(
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            hash=self._digest.hexdigest(),
        )
