"""The tokenizer that a corpus asks for: made once a machine where it is trained on the corpus.

It sees a bounded sample of the training documents, the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.writing import replacing
from trainers.documents import PIECE_BYTES
from trainers.holdout import Split, document_hash, split, widest_split
from trainers.origins import SAMPLE_VERSION, Origin
from trainers.shards import Unit, documents
from trainers.sources import TokenizerChoice, TokenizerSource
from trainers.store import STORE_VERSION, cache, digest, locked, writing
from trainers.tokenizer import BYTES, Tokenizer, pretrained, stored, trained

SAMPLE_BYTES = 32 << 20
"""Text on which a tokenizer is trained, at most about."""
SAMPLED_UNITS = 128
"""Places of a corpus from which it is taken, at most."""
FEW_DOCUMENTS = 100
"""From so many on, what is held out lies within `widest_split`, which says how surely."""


def fitting_tokenizer(
    choice: TokenizerChoice,
    origins: Sequence[Origin],
    weights: Sequence[float],
    heldout: Mapping[str, Origin],
) -> Tokenizer:
    """The tokenizer of a corpus of those origins, which a trained one sees by their weights.

    Documents of the `heldout` sets are not among what it sees.
    """
    if not isinstance(choice, TokenizerSource):
        return BYTES
    if choice.train is None:
        return pretrained(choice)
    identity = digest(
        [
            STORE_VERSION,
            SAMPLE_VERSION,
            SAMPLE_BYTES,
            [(origin.identity, weight) for origin, weight in zip(origins, weights, strict=True)],
            sorted(origin.identity for origin in heldout.values()),
            choice.train,
            choice.separator,
        ]
    )
    place = cache() / "tokenizers" / f"{identity[:32]}.json"
    known = stored(place, choice.train)
    if known is not None:
        return known
    with writing(place), locked(place, "trains this tokenizer"):
        known = stored(place, choice.train)
        if known is not None:
            return known
        excluded = _hashes(heldout.values())
        texts = (
            text.decode(errors="replace")  # refused with its file's name when it is tokenised
            for origin, weight in zip(origins, weights, strict=True)
            for text in sample(origin, int(SAMPLE_BYTES * weight), excluded)
        )
        made = trained(texts, choice.train, choice.separator)
        with replacing(place) as file:
            file.write((made.definition or "").encode())
    return made


def sample(origin: Origin, most: int, excluded: NDArray[np.uint64]) -> list[bytes]:
    """Training documents of about `most` bytes, from all over files, from the start of a stream."""
    chosen, share, whole = _places(origin, most)
    texts: list[bytes] = []
    hashes: list[int] = []
    sizes: list[int] = []
    total = 0
    for unit in chosen:
        if total >= most:
            whole = False
            break
        taken = 0
        for document, _ in documents(unit, origin.column):
            if taken >= share:
                whole = False
                break
            if not document.text:  # it is in no corpus
                continue
            hashes.append(document_hash(document.text))
            sizes.append(len(document.text) + document.ends)
            texts.append(document.text[: max(share, PIECE_BYTES)])
            taken += len(texts[-1])
        total += taken
    known = np.array(hashes, dtype=np.uint64)
    inside = ~np.isin(known, excluded)
    lengths = np.array(sizes, dtype=np.int64)
    if origin.need is not None:
        found = beginnings_split(known[inside], lengths[inside], origin.need.tokens)
    elif whole:  # which few documents are held out is known when all of them have been seen
        found = split(known[inside], lengths[inside])
    else:
        found = widest_split()
    wanted = inside & ~found.heldout(known)
    return [text for text, taken in zip(texts, wanted, strict=True) if taken]


def beginnings_split(hashes: NDArray[np.uint64], sizes: NDArray[np.int64], least: int) -> Split:
    """What any corpus holds out that is the beginning of a stream, and at least `least` bytes.

    How much of a stream is taken depends on its tokens, which a tokenizer must be trained for.

    Parameters
    ----------
    hashes, sizes
        Of the stream's first documents, shape (documents,), and their sizes in bytes.
    least
        Bytes of a corpus; as a token of a trained tokenizer is one at least, its tokens will do.
    """
    first = int(np.searchsorted(sizes.cumsum(), least)) + 1
    counts = range(first, min(len(hashes), FEW_DOCUMENTS) + 1)
    chosen = [split(hashes[:count], sizes[:count]).chosen for count in counts]
    return Split(widest_split().level, np.unique(np.concatenate([hashes[:0], *chosen])))


def _places(origin: Origin, most: int) -> tuple[Iterable[Unit], int, bool]:
    """Units to look at, bytes to take of each, and whether they are all there are."""
    if origin.size is None:
        return origin.units(), most, False  # a corpus may take less of it
    everything = list(origin.units())
    step = math.ceil(len(everything) / SAMPLED_UNITS)
    chosen = everything[:: max(1, step)]
    return chosen, max(1, most // max(1, len(chosen))), step <= 1


def _hashes(origins: Iterable[Origin]) -> NDArray[np.uint64]:
    def each() -> Iterator[int]:
        for origin in origins:
            for unit in origin.units():
                for document, _ in documents(unit, origin.column):
                    yield document_hash(document.text)

    return np.unique(np.fromiter(each(), np.uint64))
