"""What a trial reads of a corpus: batches, as a pure function of the step, and held-out windows.

Tokens lie in memory or in a file that is mapped into it: nothing here copies them whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError

if TYPE_CHECKING:
    from trainers.tokenizer import Tokenizer

Tokens = NDArray[np.unsignedinteger[Any]]
"""uint8, uint16 or uint32, as the vocabulary needs."""

SEGMENT = 1 << 14
"""Tokens of a segment: the held-out part of a corpus in memory is made of whole ones."""
HELDOUT_WINDOWS = 4096
"""Context windows of the held-out part on which the final loss is measured."""
MIXTURE_BLOCK = 4096
"""Sequences in which a mixture's parts occur by their weights, to within one of each."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A named held-out set, for a loss of its own."""

    name: str
    tokens: Tokens
    starts: NDArray[np.int64]
    """First token of each document, ascending."""
    bytes_per_token: float | None
    """Of its text; the end of a document counts as one byte. None where tokens lose text."""
    hash: str
    """Hash of its tokens."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens, disjoint."""

    name: str
    vocabulary: int
    """Symbols."""
    train: Tokens
    """Empty for a mixture, whose parts have them."""
    heldout: Tokens
    """Empty for a mixture."""
    segment: int = SEGMENT
    """Tokens of one style in the held-out part, where `starts` does not say more."""
    bytes_per_token: float | None = 1.0
    """Of the held-out text; None where tokens lose some of it, or are no text."""
    tokenizer: Tokenizer | None = None
    """What a token is; None for symbols that are no text."""
    entropy_rate: float | None = None
    """Exact entropy in nats/token where it is known."""
    starts: NDArray[np.int64] | None = None
    """First token of each held-out document, ascending; None where they are not known."""
    known_hashes: tuple[str, str] | None = None
    """What `hashes` gives, where it need not be computed."""
    known_frequencies: NDArray[np.float64] | None = None
    """What `frequencies` gives, where it need not be computed."""
    domains: Mapping[str, Domain] = field(default_factory=dict)
    """Named held-out sets besides."""
    parts: tuple[tuple[float, Corpus], ...] = ()
    """The parts of a mixture with their weights, which add up to 1."""

    @property
    def train_tokens(self) -> int:
        """Tokens in one pass. A mixture's first pass ends where that of a part does."""
        if self.parts:
            return int(min(part.train_tokens / weight for weight, part in self.parts))
        return len(self.train)

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """Hashes of the training and the held-out tokens."""
        if self.known_hashes:
            return self.known_hashes
        digests = (
            hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()
            for part in (self.train, self.heldout)
        )
        first, second = (digest[:16] for digest in digests)
        return first, second

    @cached_property
    def frequencies(self) -> NDArray[np.float64]:
        """Share of each symbol in the training tokens, shape (vocabulary,)."""
        if self.known_frequencies is not None:
            return self.known_frequencies
        if self.parts:
            shares = [weight * part.frequencies for weight, part in self.parts]
            return np.asarray(np.sum(shares, axis=0))
        return count_symbols(self.train, self.vocabulary) / len(self.train)

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the symbol frequencies of the training tokens, nats/token.

        What a model reaches that ignores its context; a trained one that does worse has diverged.
        """
        p = self.frequencies[self.frequencies > 0]
        return float(-(p * np.log(p)).sum())


def count_symbols(tokens: Tokens, vocabulary: int) -> NDArray[np.int64]:
    """How often each symbol occurs, shape (vocabulary,)."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 20):  # bincount widens its input 8-fold
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=vocabulary)
    return counts


class Batches:
    """The batches of one trial: a pure function of (corpus, seed, step).

    A pass visits every window of `context` tokens once, in an order and from a phase that depend on
    the seed and the pass alone, so that an interrupted training reads on where it was. A mixture
    draws its sequences from its parts by weight, and passes over each part on its own.
    """

    def __init__(self, corpus: Corpus, *, context: int, sequences: int, seed: int) -> None:
        """Raises InputError if the corpus, or a part of it, has not one window a pass."""
        require_windows(corpus, context)
        self._sequences = sequences
        self._mixture: _Interleaving | None = None
        if corpus.parts:
            self._mixture = _Interleaving([weight for weight, _ in corpus.parts], seed)
            self._passes = [
                _Passes(part.train, context, seed, (number,))
                for number, (_, part) in enumerate(corpus.parts)
            ]
        else:
            self._passes = [_Passes(corpus.train, context, seed)]

    def batch(self, step: int) -> NDArray[np.int64]:
        """Batch of one step, shape (sequences, context + 1): inputs, and targets one further."""
        first = step * self._sequences
        if self._mixture is None:
            return self._passes[0].windows(first, self._sequences)
        part, before = self._mixture.parts(first, self._sequences)
        width = self._passes[0].context + 1
        batch = np.empty((self._sequences, width), dtype=np.int64)
        for number, passes in enumerate(self._passes):
            rows = part == number
            if rows.any():
                batch[rows] = passes.windows(int(before[number]), int(rows.sum()))
        return batch


class _Passes:
    """One array's windows in the order in which a trial visits them, pass after pass."""

    def __init__(
        self, tokens: Tokens, context: int, seed: int, stream: tuple[int, ...] = ()
    ) -> None:
        self._tokens = tokens
        self.context = context
        self._seed = seed
        self._stream = stream
        """What tells the random numbers of a mixture's parts from each other."""
        self._windows = windows_per_pass(len(tokens), context)
        self._pass: tuple[int, int, NDArray[np.uint32]] | None = None

    def windows(self, first: int, count: int) -> NDArray[np.int64]:
        """From the `first` window on, over all passes, shape (count, context + 1)."""
        index = np.arange(first, first + count)
        starts = np.concatenate(
            [
                self._starts(number, index[index // self._windows == number] % self._windows)
                for number in range(index[0] // self._windows, index[-1] // self._windows + 1)
            ]
        )
        return _cut(self._tokens, starts, self.context)

    def _starts(self, number: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens of the windows of a pass with those numbers in its order."""
        if self._pass is None or self._pass[0] != number:
            rng = np.random.default_rng([self._seed, number, *self._stream])
            phase = int(rng.integers(self.context))
            # Four bytes a window, not eight: at context 64 the order is a sixteenth of the text.
            order = rng.permutation(np.arange(self._windows, dtype=np.uint32))
            self._pass = number, phase, order
        _, phase, order = self._pass
        starts: NDArray[np.int64] = order[index].astype(np.int64) * self.context + phase
        return starts


class _Interleaving:
    """Which part of a mixture each sequence of a trial is from.

    In blocks of `MIXTURE_BLOCK` sequences each part has its share, in random order, so that how
    often it was drawn before any sequence needs no look at the ones before.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        self._edges = np.concatenate([[0.0], np.cumsum(weights)])
        self._edges[-1] = 1.0  # shares of a block add up to it exactly
        self._seed = seed
        self._block: tuple[int, NDArray[np.int64]] | None = None

    def parts(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Part of each of `count` sequences, and how often each part was drawn before them."""
        block, offset = divmod(first, MIXTURE_BLOCK)
        in_block = np.bincount(self._order(block)[:offset], minlength=len(self._edges) - 1)
        before: NDArray[np.int64] = self._drawn(block) + in_block
        last = (first + count - 1) // MIXTURE_BLOCK
        blocks = np.concatenate([self._order(number) for number in range(block, last + 1)])
        return blocks[offset : offset + count], before

    def _drawn(self, blocks: int) -> NDArray[np.int64]:
        """How often each part occurs in the first blocks."""
        edges: NDArray[np.int64] = np.rint(blocks * MIXTURE_BLOCK * self._edges).astype(np.int64)
        return np.diff(edges)

    def _order(self, block: int) -> NDArray[np.int64]:
        if self._block is None or self._block[0] != block:
            shares = self._drawn(block + 1) - self._drawn(block)
            rng = np.random.default_rng([self._seed, block, len(shares)])
            self._block = block, rng.permutation(np.repeat(np.arange(len(shares)), shares))
        return self._block[1]


def windows_per_pass(tokens: int, context: int) -> int:
    """Windows that one pass over `tokens` tokens holds, whatever its phase."""
    return (tokens - context) // context


def require_windows(corpus: Corpus, context: int) -> None:
    """Refuse a corpus of which some part has not one window a pass.

    Raises
    ------
    InputError
        With how long it should be.
    """
    for _, part in corpus.parts or ((1.0, corpus),):
        require_window(part.name, part.train_tokens, context)


def require_window(name: str, tokens: int, context: int) -> None:
    """Refuse training tokens of which a pass is not one window: see `require_windows`."""
    if windows_per_pass(tokens, context) < 1:
        raise InputError(
            f"corpus {name} has {tokens:,} tokens to train on, and a pass over it takes at least "
            f"{2 * context:,}, two contexts: give it more text, raise the tokens or unique_tokens "
            "that it sets, or choose a shorter context"
        )


@dataclass(frozen=True)
class HeldoutWindows:
    """Fixed, evenly spaced windows of the held-out part: the same for every trial."""

    windows: NDArray[np.int64]
    """Shape (windows, context + 1)."""
    segment: NDArray[np.int64]
    """Document, or segment of the corpus, in which each window starts, shape (windows,)."""
    part: NDArray[np.int64]
    """Of a mixture, of which each window is, shape (windows,)."""


def heldout_windows(corpus: Corpus, context: int, count: int = HELDOUT_WINDOWS) -> HeldoutWindows:
    """Up to `count` windows of `context` tokens, evenly spread over the held-out part.

    Of a mixture, as many of each part as its weight asks for.

    Raises
    ------
    InputError
        If the held-out part is shorter than one window.
    """
    if not corpus.parts:
        starts = _spread(corpus.heldout, corpus.name, context, count)
        if corpus.starts is None:
            segment = starts // corpus.segment
        else:
            segment = np.searchsorted(corpus.starts, starts, side="right") - 1
        return _of_one(_cut(corpus.heldout, starts, context), segment)
    most = min((len(part.heldout) - 1) // context / weight for weight, part in corpus.parts)
    shares = [
        heldout_windows(part, context, max(1, int(min(count, most) * weight)))
        for weight, part in corpus.parts
    ]
    offsets = np.cumsum([0, *(share.segment[-1] + 1 for share in shares[:-1])])
    return HeldoutWindows(
        np.concatenate([share.windows for share in shares]),
        np.concatenate([s.segment + offset for s, offset in zip(shares, offsets, strict=True)]),
        np.repeat(np.arange(len(shares)), [len(share.windows) for share in shares]),
    )


def _of_one(windows: NDArray[np.int64], segment: NDArray[np.int64]) -> HeldoutWindows:
    return HeldoutWindows(windows, segment, np.zeros(len(windows), dtype=np.int64))


def domain_windows(domain: Domain, context: int, count: int = HELDOUT_WINDOWS) -> HeldoutWindows:
    """Up to `count` windows of `context` tokens, evenly spread over a named held-out set.

    Raises
    ------
    InputError
        If the set is shorter than one window.
    """
    starts = _spread(domain.tokens, domain.name, context, count)
    segment = np.searchsorted(domain.starts, starts, side="right") - 1
    return _of_one(_cut(domain.tokens, starts, context), segment)


def _spread(tokens: Tokens, name: str, context: int, count: int) -> NDArray[np.int64]:
    available = (len(tokens) - 1) // context
    if available < 1:
        raise InputError(
            f"context {context} is longer than the held-out part of {name} ({len(tokens):,} "
            "tokens): choose a shorter context or give more text"
        )
    taken = min(available, count)
    return np.arange(taken) * available // taken * context


def _cut(tokens: Tokens, starts: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    windows: NDArray[np.int64] = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return windows
