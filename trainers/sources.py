"""What a corpus is made of: small frozen values that a sweep file declares and a trial carries.

Nothing is read here. The same value means the same tokens on every machine that has its files.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag

from trainers.batches import SEGMENT

_STRICT = {"extra": "forbid", "strict": True}
"""For sweep.toml, where sources are tables: unknown keys and other types are errors."""

HELDOUT_EVERY = 16
"""One segment, or document, in so many is held out..."""
MAX_HELDOUT_SEGMENTS = 256
"""...but no more than about these: 4 MiB of held-out tokens are plenty."""
FIRST_HELDOUT = HELDOUT_EVERY // 2
LEAST_TOKENS = (FIRST_HELDOUT + 1) * SEGMENT
"""Of a corpus: fewer cannot be trained on and measured on."""
MAX_MARKOV_STATES = 65_536
"""Its law is found by iterating over all states: more would take minutes."""
MAX_MARKOV_TOKENS = 2_000_000_000
"""They are drawn in memory, a byte each: a hundred times the default is ample for a known law."""
LEAST_VOCABULARY = 257
"""Of a trained tokenizer: the bytes and the separator."""
MAX_VOCABULARY = 1 << 20
LEAST_WEIGHT = 0.001
"""Of a part of a mixture, so that it occurs in every block of sequences."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """Where a tokenizer comes from that is not bytes; needs the extra `text`. Give one of three."""

    __pydantic_config__ = _STRICT
    train: int | None = None
    """Symbols of a byte-level BPE to be trained on the corpus's own training documents."""
    file: str | None = None
    """A tokenizer.json, relative to the sweep's file."""
    hub: str | None = None
    """A repository on the Hugging Face hub."""
    revision: str = "main"
    """Of the repository: pin it to a commit."""
    separator: str | None = None
    """The token that ends a document, where it has none of the usual names."""

    def __post_init__(self) -> None:
        given = [name for name in ("train", "file", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs one of train, file and hub, but has {' and '.join(given) or 'none'}"
            )
        if self.train is not None and not LEAST_VOCABULARY <= self.train <= MAX_VOCABULARY:
            raise ValueError(
                f"has train = {self.train:,}, but a trained vocabulary has {LEAST_VOCABULARY} "
                f"(all bytes and a separator) to {MAX_VOCABULARY:,} symbols"
            )


def _kind_of_tokenizer(value: Any) -> str:
    return "name" if isinstance(value, str) else "table"


TokenizerChoice = Annotated[
    Annotated[Literal["bytes"], Tag("name")] | Annotated[TokenizerSource, Tag("table")],
    Discriminator(_kind_of_tokenizer),
]
"""`"bytes"`, of which each is a token, or a table."""


@dataclass(frozen=True, kw_only=True)
class Stdlib:
    """The Python standard library's own source: real text that every machine has.

    Left out: tests, generated tables and bundled packages. It differs between versions of Python,
    and so does its hash.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["stdlib"] = "stdlib"
    unique_tokens: int | None = None
    """Only the first so many training tokens, for data-constrained laws."""

    def __post_init__(self) -> None:
        _check_unique(self.unique_tokens)


@dataclass(frozen=True, kw_only=True)
class Markov:
    """A stationary Markov chain with Gaussian logits, whose entropy rate is known exactly.

    No model's held-out loss can be below it, and it is the E of any law that is true of it.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["markov"] = "markov"
    tokens: int = 12_000_000
    symbols: int = 64
    order: int = 2
    temperature: float = 0.4
    """Logits are standard Gaussian over this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (2 <= self.symbols <= 256 and 1 <= self.order <= 4):
            raise ValueError("needs 2 to 256 symbols and an order of 1 to 4")
        if self.symbols**self.order > MAX_MARKOV_STATES:
            raise ValueError(
                f"has {self.symbols**self.order:,} states (symbols to the power of order), "
                f"more than {MAX_MARKOV_STATES:,}"
            )
        if not (self.temperature > 0 and self.tokens > 0 and self.seed >= 0):
            raise ValueError("needs temperature and tokens above 0 and a seed of at least 0")
        if self.tokens > MAX_MARKOV_TOKENS:
            raise ValueError(
                f"has tokens = {self.tokens:,}, but at most {MAX_MARKOV_TOKENS:,} are drawn: use "
                "more epochs, or files"
            )


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files by glob (`**` crosses directories), in sorted order.

    Rows of .jsonl, .jsonl.gz and .parquet are documents, of which `column` is the text; any other
    file is a document itself.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["files"] = "files"
    glob: str
    """Relative to the sweep's file."""
    column: str = "text"
    """Of rows."""
    tokenizer: TokenizerChoice = "bytes"
    """What a token is. Of a mixture's part: the mixture says it."""
    heldout: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Further held-out sets, name = glob; a training document that is in one is left out."""
    unique_tokens: int | None = None
    """Only the first so many training tokens, for data-constrained laws."""
    name: str | None = None
    """For people; names a mixture's part, whose held-out documents are a held-out set."""
    weight: float = 1.0
    """Share among the parts of a mixture; without meaning elsewhere."""

    def __post_init__(self) -> None:
        _check_unique(self.unique_tokens)
        _check_weight(self.weight)


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A text column of a dataset on the Hugging Face hub or in a directory (extra `text`).

    Its hash is that of this declaration: pin `revision` to a commit, so that it names content.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["hugging_face"] = "hugging_face"
    dataset: str
    """A name on the hub; a directory where it begins with ./, ../ or /, relative to the sweep's
    file."""
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    """Of a name on the hub."""
    column: str = "text"
    tokens: int
    """To take, from the first document on; a sixteenth at most is held out."""
    tokenizer: TokenizerChoice = "bytes"
    """What a token is. Of a mixture's part: the mixture says it."""
    heldout: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Further held-out sets, name = glob of files; a training document in one is left out."""
    unique_tokens: int | None = None
    """Only the first so many training tokens, for data-constrained laws."""
    name: str | None = None
    """For people; names a mixture's part, whose held-out documents are a held-out set."""
    weight: float = 1.0
    """Share among the parts of a mixture; without meaning elsewhere."""

    def __post_init__(self) -> None:
        if self.tokens < LEAST_TOKENS:
            raise ValueError(f"needs at least {LEAST_TOKENS:,} tokens to hold out a part of them")
        _check_unique(self.unique_tokens)
        _check_weight(self.weight)
        if self.unique_tokens is not None and self.unique_tokens > self.declared_train_tokens:
            raise ValueError(
                f"has unique_tokens = {self.unique_tokens:,}, but trains on "
                f"{self.declared_train_tokens:,} of its tokens"
            )

    @property
    def is_directory(self) -> bool:
        """Whether it is no name on the hub. How it is written says so, whatever is there."""
        return self.dataset.startswith(("/", "./", "../"))

    @property
    def unpinned(self) -> list[str]:
        """What of the declaration names no content: branches and tags may move, commits do not."""
        names = {} if self.is_directory else {"revision": self.revision}
        if isinstance(self.tokenizer, TokenizerSource) and self.tokenizer.hub is not None:
            names["tokenizer.revision"] = self.tokenizer.revision
        moving = {k: name for k, name in names.items() if not re.fullmatch("[0-9a-f]{40}", name)}
        return [f'{key} = "{name}"' for key, name in moving.items()]

    @property
    def declared_train_tokens(self) -> int:
        """Training tokens before `unique_tokens` limits them."""
        return int((~held_segments(self.tokens // SEGMENT)).sum()) * SEGMENT

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return self.unique_tokens or self.declared_train_tokens


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources with one tokenizer; batches draw sequences from them by weight."""

    __pydantic_config__ = _STRICT
    kind: Literal["mixture"] = "mixture"
    parts: tuple[Annotated[Files | HuggingFace, Field(discriminator="kind")], ...]
    """Tables with their `weight`; weights need not add up to 1."""
    tokenizer: TokenizerChoice = "bytes"
    """What a token is; a trained one sees each part by its weight."""
    heldout: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Held-out sets besides those of the parts, name = glob of files."""
    name: str | None = None
    """For people."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"needs at least 2 parts, but has {len(self.parts)}")
        for part in self.parts:
            for key in ("tokenizer", "heldout"):
                if getattr(part, key) != ("bytes" if key == "tokenizer" else {}):
                    raise ValueError(f"has a part with a {key} of its own: give the mixture one")
            if part.weight < LEAST_WEIGHT * self._total:
                raise ValueError(
                    f"has a part of {part.weight / self._total:.2g} of its weight, less than "
                    f"{LEAST_WEIGHT}"
                )
        names = [*map(describe, self.parts), *self.heldout]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"has two parts or held-out sets called {twice[0]!r}: name them apart")

    @property
    def _total(self) -> float:
        return sum(part.weight for part in self.parts)

    @property
    def weights(self) -> list[float]:
        """Of the parts; they add up to 1, and do not depend on the scale they are given in."""
        # 7 of 10 and .7 of 1 differ in the last of 16 digits.
        return [float(f"{part.weight / self._total:.12g}") for part in self.parts]


CorpusSource = Stdlib | Files | Markov | HuggingFace | Mixture
TextSource = Files | HuggingFace | Mixture
"""Sources whose tokens are stored on the machine's disk."""
_KINDS: dict[str, type[CorpusSource]] = {
    "stdlib": Stdlib,
    "files": Files,
    "markov": Markov,
    "hugging_face": HuggingFace,
    "mixture": Mixture,
}


def _check_unique(unique_tokens: int | None) -> None:
    if unique_tokens is not None and unique_tokens < 1:
        raise ValueError(f"has unique_tokens = {unique_tokens:,}, but they are at least 1")


def _check_weight(weight: float) -> None:
    if not 0 < weight < math.inf:
        raise ValueError(f"has weight = {weight:g}, but it should be finite and more than 0")


def held_segments(segments: int) -> NDArray[np.bool_]:
    """Which segments of a corpus in memory are held out: every 16th, from the 9th on."""
    every = max(HELDOUT_EVERY, math.ceil(segments / MAX_HELDOUT_SEGMENTS))
    held: NDArray[np.bool_] = np.arange(segments) % every == FIRST_HELDOUT
    return held


def source_from_dict(data: Mapping[str, Any]) -> CorpusSource:
    """Inverse of `dataclasses.asdict` for a source."""
    values = dict(data)
    if isinstance(values.get("tokenizer"), Mapping):
        values["tokenizer"] = TokenizerSource(**values["tokenizer"])
    if "parts" in values:
        values["parts"] = tuple(source_from_dict(part) for part in values["parts"])
    return _KINDS[values["kind"]](**values)


def describe(source: CorpusSource) -> str:
    """A corpus's name, for people."""
    match source:
        case Stdlib():
            return "python-stdlib"
        case Files():
            return source.name or f"files:{Path(source.glob).name}"
        case Markov():
            return f"markov{source.order}-{source.symbols}"
        case HuggingFace():
            config = f"/{source.config}" if source.config else ""
            return source.name or f"hf:{source.dataset}{config}"
        case Mixture():
            return source.name or "+".join(map(describe, source.parts))


def named_files(source: object) -> Iterator[str]:
    """Globs of every file that a source names on its own machine; none of what is no source."""
    if isinstance(source, Files):
        yield source.glob
    if isinstance(source, HuggingFace) and source.is_directory:
        yield f"{glob.escape(source.dataset)}/**"
    if isinstance(source, Files | HuggingFace | Mixture):
        yield from source.heldout.values()
        if isinstance(source.tokenizer, TokenizerSource) and source.tokenizer.file:
            yield glob.escape(source.tokenizer.file)
    if isinstance(source, Mixture):
        for part in source.parts:
            yield from named_files(part)


_Source = TypeVar("_Source", bound=CorpusSource)


def with_files(
    source: _Source, *, pattern: Callable[[str], str], file: Callable[[str], str]
) -> _Source:
    """The source with each glob and each path changed that it names on its own machine."""
    changes: dict[str, Any] = {}
    if isinstance(source, Files):
        changes["glob"] = pattern(source.glob)
    if isinstance(source, HuggingFace) and source.is_directory:
        changes["dataset"] = file(source.dataset)
    if isinstance(source, Files | HuggingFace | Mixture):
        changes["heldout"] = {name: pattern(held) for name, held in source.heldout.items()}
        if isinstance(source.tokenizer, TokenizerSource) and source.tokenizer.file:
            moved = dataclasses.replace(source.tokenizer, file=file(source.tokenizer.file))
            changes["tokenizer"] = moved
    if isinstance(source, Mixture):
        changes["parts"] = tuple(with_files(p, pattern=pattern, file=file) for p in source.parts)
    return dataclasses.replace(source, **changes)
