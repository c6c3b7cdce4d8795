"""Where tokens come from: a source is loaded into a corpus, once a process.

Built-in sources are generated in memory. Text is tokenised once a machine into a store on disk,
which processes map into their memory: none of them holds the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.visible import visible
from trainers.batches import (
    HELDOUT_WINDOWS,
    SEGMENT,
    Batches,
    Corpus,
    Domain,
    HeldoutWindows,
    Tokens,
    count_symbols,
    domain_windows,
    heldout_windows,
    require_window,
    require_windows,
    windows_per_pass,
)
from trainers.builtin import markov_corpus, stdlib_corpus, too_unique
from trainers.origins import Origin, declared_hash, heldout_origins, origins_of
from trainers.shards import build
from trainers.sources import (
    CorpusSource,
    Files,
    HuggingFace,
    Markov,
    Mixture,
    Stdlib,
    TextSource,
    TokenizerSource,
    describe,
    source_from_dict,
)
from trainers.store import STORE_VERSION, Store, cache, digest, ensure
from trainers.tokenizer import BYTES, Tokenizer, pretrained
from trainers.tokenizer_training import fitting_tokenizer

__all__ = [
    "HELDOUT_WINDOWS",
    "SEGMENT",
    "Batches",
    "Corpus",
    "CorpusSource",
    "Domain",
    "Files",
    "HeldoutWindows",
    "HuggingFace",
    "Markov",
    "Mixture",
    "Stdlib",
    "TokenizerSource",
    "Tokens",
    "declared_hash",
    "describe",
    "domain_windows",
    "heldout_windows",
    "load",
    "require_window",
    "require_windows",
    "source_from_dict",
    "vocabulary",
    "windows_per_pass",
]


def load(source: CorpusSource) -> Corpus:
    """Read, generate or map a corpus. Kept for the process: trials share it.

    Text that this machine has not tokenised yet is tokenised first, with a progress bar.

    Raises
    ------
    InputError
        If a glob matches nothing, a file is not what its suffix says, or the corpus is too small to
        have a held-out part.
    """
    return _loaded(json.dumps(dataclasses.asdict(source), sort_keys=True))


@lru_cache(maxsize=2)
def _loaded(declaration: str) -> Corpus:
    source = source_from_dict(json.loads(declaration))
    match source:
        case Stdlib():
            return stdlib_corpus(source)
        case Markov():
            return markov_corpus(source)
        case Files() | HuggingFace() | Mixture():
            return _text_corpus(source)


def vocabulary(source: CorpusSource) -> int:
    """Symbols of the corpus: its models' vocabulary. Trains no tokenizer."""
    if isinstance(source, Stdlib | Markov):
        return source.symbols if isinstance(source, Markov) else 256
    choice = source.tokenizer
    if isinstance(choice, TokenizerSource):
        return choice.train or pretrained(choice).vocabulary
    return BYTES.vocabulary


def _text_corpus(source: TextSource) -> Corpus:
    origins, heldout = origins_of(source), heldout_origins(source)
    weights = _weights(source)
    made = fitting_tokenizer(source.tokenizer, origins, weights, heldout)
    stores = {
        name: _stored(origin, made, excluded=_NONE, untrained=_NONE, all_heldout=True)
        for name, origin in heldout.items()
    }
    domains = {name: _domain(name, store) for name, store in stores.items()}
    parts = source.parts if isinstance(source, Mixture) else (source,)
    corpora = [
        _corpus(part, made, store)
        for part, store in zip(parts, _disjoint(origins, made, _held(stores.values())), strict=True)
    ]
    if isinstance(source, Mixture):
        return _mixture(source, made, list(zip(weights, corpora, strict=True)), domains)
    corpus = corpora[0]
    hashes = (corpus.hashes[0], _with_domains(corpus.hashes[1], domains))
    if isinstance(source, HuggingFace):
        hashes = (declared_hash(source),) * 2
    return dataclasses.replace(corpus, known_hashes=hashes, domains=domains)


_NONE = np.empty(0, np.uint64)


def _held(stores: Iterable[Store]) -> NDArray[np.uint64]:
    """Hashes of the documents that they hold out."""
    return np.unique(np.concatenate([_NONE, *(store.documents["hash"] for store in stores)]))


def _disjoint(
    origins: Sequence[Origin], made: Tokenizer, excluded: NDArray[np.uint64]
) -> list[Store]:
    """A store of each part, none of which trains on what another one holds out.

    A part with such a document is tokenised again without it. Of files that changes nothing in what
    is held out; of a stream, of which more is read then, it may, and is looked at again.
    """
    untrained = [_NONE for _ in origins]
    while True:
        stores = [
            _stored(origin, made, excluded=excluded, untrained=left_out)
            for origin, left_out in zip(origins, untrained, strict=True)
        ]
        held = _held(stores)
        shared = [held[_within(held, store.trained)] for store in stores]
        if not any(map(len, shared)):
            return stores
        untrained = [np.union1d(*pair) for pair in zip(untrained, shared, strict=True)]


def _within(hashes: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of a few hashes are among many, which are not read whole."""
    if not len(ascending):
        return np.zeros(len(hashes), dtype=np.bool_)
    place = np.searchsorted(ascending, hashes).clip(max=len(ascending) - 1)
    return np.asarray(ascending[place] == hashes)


def _weights(source: TextSource) -> list[float]:
    return source.weights if isinstance(source, Mixture) else [1.0]


def _corpus(source: Files | HuggingFace, made: Tokenizer, store: Store) -> Corpus:
    name, manifest, train = describe(source), store.manifest, store.train
    _tell_loss(name, store)
    if manifest.vocabulary != made.vocabulary:  # by someone's hand: its identity says the tokenizer
        raise InputError(
            f"corpus {name} is stored with {manifest.vocabulary} symbols, but its tokenizer has "
            f"{made.vocabulary}: remove it from {cache() / 'corpora'}"
        )
    if not len(train):
        raise InputError(
            f"corpus {name} has nothing to train on: all of its documents are held out, here or in "
            "another part: give it others, or leave it out"
        )
    train_hash = manifest.train.hash[:16]
    limit = source.unique_tokens
    if isinstance(source, HuggingFace):
        limit = source.train_tokens
    if limit is not None:
        if limit > len(train):
            raise too_unique(name, limit, len(train))
        train, train_hash = train[:limit], digest([train_hash, limit])[:16]
    return Corpus(
        name,
        made.vocabulary,
        train,
        store.heldout,
        bytes_per_token=store.bytes_per_token,
        tokenizer=made,
        starts=store.documents["start"],
        known_hashes=(train_hash, manifest.heldout.hash[:16]),
        known_frequencies=_frequencies(store, len(train)),
    )


def _frequencies(store: Store, tokens: int) -> NDArray[np.float64]:
    """Share of each symbol in the first so many training tokens, shape (vocabulary,)."""
    first, rest = store.train[:tokens], store.train[tokens:]
    if len(first) < len(rest):  # those of all are known
        counts = count_symbols(first, len(store.counts))
    else:
        counts = store.counts - count_symbols(rest, len(store.counts))
    return np.asarray(counts / tokens)


def _tell_loss(name: str, store: Store) -> None:
    """Say why what is measured on a store will have no bits per byte, if so."""
    if store.bytes_per_token is None:
        print(
            visible(
                f"isoflop: {store.manifest.lost:.0%} of the text of {name} is in lines that its "
                "tokens do not give back, so that bits per byte would be wrong, and are left empty"
            ),
            file=sys.stderr,
        )


def _mixture(
    source: Mixture,
    made: Tokenizer,
    parts: list[tuple[float, Corpus]],
    named: Mapping[str, Domain],
) -> Corpus:
    """The mixture of those parts, whose held-out sets are those that are named and its parts'."""
    nothing = np.empty(0, made.dtype)
    hashes = [[(weight, part.hashes[side]) for weight, part in parts] for side in (0, 1)]
    text = [weight * part.bytes_per_token for weight, part in parts if part.bytes_per_token]
    return Corpus(
        describe(source),
        made.vocabulary,
        nothing,
        nothing,
        bytes_per_token=sum(text) if len(text) == len(parts) else None,
        tokenizer=made,
        known_hashes=(
            digest(hashes[0])[:16],
            # Names of parts are for people, and what they hold out is in it already.
            _with_domains(digest(hashes[1])[:16], named),
        ),
        domains={**named, **{part.name: _own_domain(part) for _, part in parts}},
        parts=tuple(parts),
    )


def _domain(name: str, store: Store) -> Domain:
    if not len(store.heldout):
        raise InputError(f"the held-out set {name} has no text: give it some, or leave it out")
    _tell_loss(f"the held-out set {name}", store)
    return Domain(
        name=name,
        tokens=store.heldout,
        starts=store.documents["start"],
        bytes_per_token=store.bytes_per_token,
        hash=store.manifest.heldout.hash[:16],
    )


def _own_domain(corpus: Corpus) -> Domain:
    """The held-out part of a mixture's part."""
    assert corpus.starts is not None
    return Domain(
        name=corpus.name,
        tokens=corpus.heldout,
        starts=corpus.starts,
        bytes_per_token=corpus.bytes_per_token,
        hash=corpus.hashes[1],
    )


def _with_domains(heldout_hash: str, domains: Mapping[str, Domain]) -> str:
    """One hash for all that a trial is measured on."""
    if not domains:
        return heldout_hash
    return digest([heldout_hash, sorted((d.name, d.hash) for d in domains.values())])[:16]


def _stored(
    origin: Origin,
    made: Tokenizer,
    *,
    excluded: NDArray[np.uint64],
    untrained: NDArray[np.uint64],
    all_heldout: bool = False,
) -> Store:
    """The store of an origin's documents, made now where there is none."""
    identity = digest(
        [
            STORE_VERSION,
            origin.identity,
            made.identity,
            all_heldout,
            [hashlib.sha256(hashes.data).hexdigest() for hashes in (excluded, untrained)],
        ]
    )

    def make(place: Path) -> None:
        build(
            place,
            origin.units(),
            name=origin.name,
            column=origin.column,
            tokenizer=made,
            excluded=excluded,
            untrained=untrained,
            all_heldout=all_heldout,
            need=origin.need,
            total=origin.size,
        )
        origin.unchanged()

    return ensure(identity[:32], make)
