"""Where tokens come from: sources, their held-out part, and batches as a pure function of the step.

A source is a small frozen value that travels with a trial; `load` turns it into tokens, once a
process. Tokens are bytes (or symbols of a synthetic source); a corpus is known by its hash.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import math
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError

Tokens = NDArray[np.uint8]

_FORBID = {"extra": "forbid"}
"""For sweep.toml, where sources are tables: an unknown key is an error."""

SEGMENT = 1 << 14
"""Tokens of a segment: the held-out part is made of whole segments, so that it is text."""
HELDOUT_EVERY = 16
"""One segment in so many is held out..."""
MAX_HELDOUT_SEGMENTS = 256
"""...but no more than about these: 4 MiB of held-out tokens are plenty."""
MAX_MARKOV_STATES = 65_536
"""Its law is found by iterating over all states: more would take minutes."""
HELDOUT_WINDOWS = 4096
"""Context windows of the held-out part on which the final loss is measured."""
_FIRST_HELDOUT = HELDOUT_EVERY // 2
_LEAST_TOKENS = (_FIRST_HELDOUT + 1) * SEGMENT


@dataclass(frozen=True, kw_only=True)
class Stdlib:
    """The Python standard library's own source: real text that every machine has.

    Left out: tests, generated tables and bundled packages. It differs between versions of Python,
    and so does its hash.
    """

    __pydantic_config__ = _FORBID
    kind: Literal["stdlib"] = "stdlib"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Text files by glob (`**` crosses directories), in sorted order, as bytes."""

    __pydantic_config__ = _FORBID
    kind: Literal["files"] = "files"
    glob: str
    """Relative to the sweep's file."""


@dataclass(frozen=True, kw_only=True)
class Markov:
    """A stationary Markov chain with Gaussian logits, whose entropy rate is known exactly.

    No model's held-out loss can be below it, and it is the E of any law that is true of it.
    """

    __pydantic_config__ = _FORBID
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


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A text column of a dataset on the Hugging Face hub, as bytes (needs the extra `text`).

    Its hash is that of this declaration: pin `revision` to a commit, so that it names content. Read
    into memory by every worker: for corpora that fit there.
    """

    __pydantic_config__ = _FORBID
    kind: Literal["hugging_face"] = "hugging_face"
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    column: str = "text"
    tokens: int
    """Bytes to take, from the first document on; a sixteenth at most is held out."""

    def __post_init__(self) -> None:
        if self.tokens < _LEAST_TOKENS:
            raise ValueError(f"needs at least {_LEAST_TOKENS:,} tokens to hold out a part of them")

    @property
    def train_tokens(self) -> int:
        """Bytes to train on."""
        held = _held_segments(self.tokens // SEGMENT)
        return int((~held).sum()) * SEGMENT


CorpusSource = Stdlib | Files | Markov | HuggingFace


def source_from_dict(data: dict[str, Any]) -> CorpusSource:
    """Inverse of `dataclasses.asdict` for a source."""
    classes = {"stdlib": Stdlib, "files": Files, "markov": Markov, "hugging_face": HuggingFace}
    source: CorpusSource = classes[data["kind"]](**data)
    return source


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens, disjoint."""

    name: str
    vocabulary: int
    """Symbols."""
    train: Tokens
    heldout: Tokens
    segment: int = SEGMENT
    bytes_per_token: float | None = 1.0
    """None for synthetic symbols that are no text."""
    entropy_rate: float | None = None
    """Exact entropy in nats/token where it is known."""

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """Hashes of the training and the held-out tokens."""
        digests = (
            hashlib.sha256(part.tobytes()).hexdigest() for part in (self.train, self.heldout)
        )
        first, second = (digest[:16] for digest in digests)
        return first, second

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the symbol frequencies of the training tokens, nats/token.

        What a model reaches that ignores its context; a trained one that does worse has diverged.
        """
        counts = np.zeros(self.vocabulary, dtype=np.int64)
        for start in range(0, len(self.train), 1 << 20):  # bincount widens its input 8-fold
            counts += np.bincount(self.train[start : start + (1 << 20)], minlength=self.vocabulary)
        p = counts[counts > 0] / len(self.train)
        return float(-(p * np.log(p)).sum())


def describe(source: CorpusSource) -> str:
    """A corpus's name, for people."""
    match source:
        case Stdlib():
            return "python-stdlib"
        case Files():
            return f"files:{Path(source.glob).name}"
        case Markov():
            return f"markov{source.order}-{source.symbols}"
        case HuggingFace():
            return f"hf:{source.dataset}" + (f"/{source.config}" if source.config else "")


def vocabulary(source: CorpusSource) -> int:
    """Symbols of the corpus: its models' vocabulary."""
    return source.symbols if isinstance(source, Markov) else 256


def declared_hash(source: HuggingFace) -> str:
    """The hash by which a remote corpus is known before it is downloaded."""
    return hashlib.sha256(repr(sorted(dataclasses.asdict(source).items())).encode()).hexdigest()[
        :16
    ]


@lru_cache(maxsize=2)
def load(source: CorpusSource) -> Corpus:
    """Read or generate a corpus. Kept for the process: trials share it.

    Raises
    ------
    InputError
        If a glob matches nothing or the corpus is too small to have a held-out part.
    """
    name = describe(source)
    match source:
        case Stdlib():
            return _split(name, _as_tokens(_stdlib_bytes()))
        case Files():
            return _split(name, _as_tokens(_files_bytes(source)))
        case HuggingFace():
            return _split(name, _as_tokens(_hugging_face_bytes(source)))
        case Markov():
            tokens, entropy = _markov(source)
            split = _split(name, tokens)
            return dataclasses.replace(
                split, vocabulary=source.symbols, bytes_per_token=None, entropy_rate=entropy
            )


def _as_tokens(text: bytes) -> Tokens:
    return np.frombuffer(text, dtype=np.uint8)


def _split(name: str, tokens: Tokens) -> Corpus:
    """Hold out every 16th segment, from the 9th on; a partial last segment is dropped."""
    if len(tokens) < _LEAST_TOKENS:
        raise InputError(
            f"corpus {name} has {len(tokens):,} bytes, fewer than the {_LEAST_TOKENS:,} that it "
            "takes to hold out a part of it: give it more text"
        )
    segments = len(tokens) // SEGMENT
    rows = tokens[: segments * SEGMENT].reshape(segments, SEGMENT)
    held = _held_segments(segments)
    return Corpus(name, 256, rows[~held].reshape(-1), rows[held].reshape(-1))


def _held_segments(segments: int) -> NDArray[np.bool_]:
    every = max(HELDOUT_EVERY, math.ceil(segments / MAX_HELDOUT_SEGMENTS))
    held: NDArray[np.bool_] = np.arange(segments) % every == _FIRST_HELDOUT
    return held


_STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}


def _stdlib_bytes() -> bytes:
    parts = []
    for directory, names, files in os.walk(sysconfig.get_paths()["stdlib"]):
        names[:] = sorted(name for name in names if name not in _STDLIB_LEFT_OUT)
        parts += [
            Path(directory, name).read_bytes()
            for name in sorted(files)
            # _sysconfigdata is generated when Python is built and differs between machines
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return b"\n".join(parts)


def _files_bytes(source: Files) -> bytes:
    paths = [Path(p) for p in sorted(glob.glob(source.glob, recursive=True)) if Path(p).is_file()]
    if not paths:
        raise InputError(f"no file matches the corpus glob {source.glob!r}")
    return b"\n".join(path.read_bytes() for path in paths)


def _hugging_face_bytes(source: HuggingFace) -> bytes:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{describe(source)} is read by `datasets`, which is not installed here: "
            "pip install 'isoflop[text]'"
        ) from error
    rows = load_dataset(
        source.dataset,
        source.config,
        split=source.split,
        revision=source.revision,
        streaming=True,
    )
    parts: list[bytes] = []
    size = 0
    for row in rows:
        parts.append(row[source.column].encode() + b"\n")
        size += len(parts[-1])
        if size >= source.tokens:
            return b"".join(parts)[: source.tokens]
    raise InputError(
        f"{describe(source)} has {size:,} bytes of text, fewer than the tokens = "
        f"{source.tokens:,} that the sweep declares"
    )


def _markov(source: Markov) -> tuple[Tokens, float]:
    """Tokens of the chain and its exact entropy rate in nats/token."""
    rng = np.random.default_rng(source.seed)
    k, states = source.symbols, source.symbols**source.order
    logits = rng.standard_normal((states, k)) / source.temperature
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    # State (s_1 .. s_m) followed by s goes to (s_2 .. s_m, s).
    follow = (np.arange(states)[:, None] * k + np.arange(k)) % states
    law = np.full(states, 1 / states)
    for _ in range(1000):
        nxt = np.bincount(follow.ravel(), (law[:, None] * chances).ravel(), minlength=states)
        if np.abs(nxt - law).sum() < 1e-13:
            break
        law = nxt
    entropy = -float(law @ (chances * np.log(chances)).sum(axis=1))
    # A few stationary chains side by side, for speed. Only the `order` symbols after each of the 63
    # joins are off the law: less than 1e-5 nats a token at a million tokens.
    chains = 64
    length = math.ceil(source.tokens / chains)
    cumulative = np.cumsum(chances, axis=1)
    cumulative[:, -1] = 1.0
    state = rng.choice(states, size=chains, p=law / law.sum())
    tokens = np.empty((chains, length), dtype=np.uint8)
    for position in range(length):
        symbol = (cumulative[state] < rng.random(chains)[:, None]).sum(axis=1)
        tokens[:, position] = symbol
        state = (state * k + symbol) % states
    return tokens.reshape(-1)[: source.tokens], entropy


class Batches:
    """The batches of one trial: a pure function of (corpus, seed, step).

    A pass visits every window of `context` tokens once, in an order and from a phase that depend on
    the seed and the pass alone, so that an interrupted training reads on where it was.
    """

    def __init__(self, corpus: Corpus, *, context: int, sequences: int, seed: int) -> None:
        self._tokens = corpus.train
        self._context = context
        self._sequences = sequences
        self._seed = seed
        self._windows = windows_per_pass(len(corpus.train), context)
        self._pass: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> NDArray[np.int64]:
        """Batch of one step, shape (sequences, context + 1): inputs, and targets one further."""
        index = np.arange(step * self._sequences, (step + 1) * self._sequences)
        starts = np.concatenate(
            [
                self._starts(number)[index[index // self._windows == number] % self._windows]
                for number in range(index[0] // self._windows, index[-1] // self._windows + 1)
            ]
        )
        return self._tokens[starts[:, None] + np.arange(self._context + 1)].astype(np.int64)

    def _starts(self, number: int) -> NDArray[np.int64]:
        """First tokens of the windows of a pass, in the order in which they are visited."""
        if self._pass is None or self._pass[0] != number:
            rng = np.random.default_rng([self._seed, number])
            phase = rng.integers(self._context)
            self._pass = number, rng.permutation(self._windows) * self._context + phase
        return self._pass[1]


def windows_per_pass(tokens: int, context: int) -> int:
    """Windows that one pass over `tokens` tokens holds, whatever its phase."""
    return (tokens - context) // context


@dataclass(frozen=True)
class HeldoutWindows:
    """Fixed, evenly spaced windows of the held-out part: the same for every trial."""

    windows: NDArray[np.int64]
    """Shape (windows, context + 1)."""
    segment: NDArray[np.int64]
    """Segment of the corpus in which each window starts, shape (windows,)."""


def heldout_windows(corpus: Corpus, context: int, count: int = HELDOUT_WINDOWS) -> HeldoutWindows:
    """Up to `count` windows of `context` tokens, evenly spread over the held-out part.

    Raises
    ------
    InputError
        If the held-out part is shorter than one window.
    """
    available = (len(corpus.heldout) - 1) // context
    if available < 1:
        raise InputError(
            f"context {context} is longer than the held-out part of {corpus.name} "
            f"({len(corpus.heldout):,} tokens)"
        )
    taken = min(available, count)
    starts = np.arange(taken) * available // taken * context
    windows = corpus.heldout[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return HeldoutWindows(windows, starts // corpus.segment)
