"""The tokenizer that a corpus asks for: made once a machine where it is trained on the corpus.

It sees a bounded sample of the training documents, the same on every machine.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainers.documents import PIECE_BYTES
from trainers.holdout import document_hash, split, widest_split
from trainers.origins import Origin
from trainers.shards import Unit, documents
from trainers.sources import TokenizerChoice, TokenizerSource
from trainers.store import STORE_VERSION, cache, digest, locked, writing
from trainers.tokenizer import BYTES, Tokenizer, pretrained, stored, trained

SAMPLE_BYTES = 32 << 20
"""Text on which a tokenizer is trained, at most about."""
SAMPLED_UNITS = 128
"""Places of a corpus from which it is taken, at most."""


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
        draft = place.with_suffix(f".{uuid.uuid4().hex}")
        draft.write_text(made.definition or "", encoding="utf-8")
        draft.replace(place)
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
            hashes.append(document_hash(document.text))
            sizes.append(len(document.text) + document.ends)
            texts.append(document.text[: max(share, PIECE_BYTES)])
            taken += len(texts[-1])
        total += taken
    known = np.array(hashes, dtype=np.uint64)
    inside = ~np.isin(known, excluded)
    # Which few documents are held out is known when all of them have been seen.
    lengths = np.array(sizes, dtype=np.int64)
    found = split(known[inside], lengths[inside]) if whole else widest_split()
    wanted = inside & ~found.heldout(known)
    return [text for text, taken in zip(texts, wanted, strict=True) if taken]


def _places(origin: Origin, most: int) -> tuple[Iterable[Unit], int, bool]:
    """Units to look at, bytes to take of each, and whether they are all there are."""
    if origin.size is None:
        return origin.units(), most, True
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
