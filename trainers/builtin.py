"""Tokens that every machine has: the Python standard library's source, and Markov chains."""

from __future__ import annotations

import dataclasses
import math
import os
import sysconfig
from pathlib import Path

import numpy as np

from analysis.errors import InputError
from trainers.batches import SEGMENT, Corpus, Tokens
from trainers.sources import LEAST_TOKENS, Markov, Stdlib, describe, held_segments
from trainers.tokenizer import BYTES


def stdlib_corpus(source: Stdlib) -> Corpus:
    """Text of the standard library, as bytes."""
    corpus = _split(describe(source), np.frombuffer(_stdlib_bytes(), dtype=np.uint8))
    if source.unique_tokens is None:
        return corpus
    if source.unique_tokens > len(corpus.train):
        raise too_unique(corpus.name, source.unique_tokens, len(corpus.train))
    return dataclasses.replace(corpus, train=corpus.train[: source.unique_tokens])


def markov_corpus(source: Markov) -> Corpus:
    """Symbols of a Markov chain, with its exact entropy rate."""
    tokens, entropy = _markov(source)
    return dataclasses.replace(
        _split(describe(source), tokens),
        vocabulary=source.symbols,
        bytes_per_token=None,
        tokenizer=None,
        entropy_rate=entropy,
    )


def too_unique(name: str, unique_tokens: int, tokens: int) -> InputError:
    """The error for a corpus that has fewer training tokens than its limit asks for."""
    return InputError(
        f"corpus {name} has {tokens:,} training tokens, fewer than its unique_tokens = "
        f"{unique_tokens:,}: lower that, or give it more text"
    )


def _split(name: str, tokens: Tokens) -> Corpus:
    """Hold out every 16th segment, from the 9th on; a partial last segment is dropped."""
    if len(tokens) < LEAST_TOKENS:
        raise InputError(
            f"corpus {name} has {len(tokens):,} bytes, fewer than the {LEAST_TOKENS:,} that it "
            "takes to hold out a part of it: give it more text"
        )
    segments = len(tokens) // SEGMENT
    rows = tokens[: segments * SEGMENT].reshape(segments, SEGMENT)
    held = held_segments(segments)
    return Corpus(
        name, BYTES.vocabulary, rows[~held].reshape(-1), rows[held].reshape(-1), tokenizer=BYTES
    )


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
