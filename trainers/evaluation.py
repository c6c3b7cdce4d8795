"""The held-out loss of a model, its standard error, and whether the training has diverged."""

from __future__ import annotations

import math

import numpy as np
import torch

from trainers.corpus import Corpus, HeldoutWindows
from trainers.flops import EVALUATION_TOKENS
from trainers.ranks import Ranks
from trainers.transformer import Transformer


def evaluate(
    model: Transformer,
    heldout: HeldoutWindows,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008 - a value
    *,
    sequences: int | None = None,
) -> tuple[float, float | None]:
    """Held-out loss and its standard error, nats/token; None where all of a part is one segment.

    Windows of one segment share its style, so they are one cluster: the error is that of a ratio
    estimate over segments, not over windows, which would be too small. How many are of which part
    of a mixture is fixed, so that parts are strata: how they differ is no error. Ranks share the
    windows: each goes through as many pieces, since those that share out a model meet in each. They
    are of `sequences` at most, all about as many; by default of `EVALUATION_TOKENS`, as a core's
    cache likes them.
    """
    context = heldout.windows.shape[1] - 1
    size = max(1, EVALUATION_TOKENS // context)
    if sequences is not None:
        share = math.ceil(len(heldout.windows) / ranks.count)
        size = math.ceil(share / math.ceil(share / sequences))
    # Written in place: a list of small results pins every piece's freed buffers between them in the
    # heap, 155 MB at context 64.
    sums = torch.zeros(len(heldout.windows), device=device)
    for first in range(0, len(sums), ranks.count * size):
        start = first + ranks.rank * size
        piece = heldout.windows[start : start + size]
        windows = torch.from_numpy(piece if len(piece) else heldout.windows[:1]).to(device)
        losses = model.token_losses(windows).sum(1)
        sums[start : start + len(piece)] = losses[: len(piece)]
    by_window = ranks.sum_(sums).double().cpu().numpy() / context
    squares = 0.0
    for part in np.unique(heldout.part):
        inside = heldout.part == part
        clusters, of = np.unique(heldout.segment[inside], return_inverse=True)
        used, losses = len(clusters), by_window[inside]
        if used < 2:  # one cluster says nothing of how clusters differ
            return float(by_window.mean()), None
        squares += used / (used - 1) * (np.bincount(of, losses - losses.mean()) ** 2).sum()
    return float(by_window.mean()), float(np.sqrt(squares) / len(by_window))


def diverged(loss: float, corpus: Corpus) -> str | None:
    """Why a held-out loss is that of a diverged training; None where it is not."""
    if not np.isfinite(loss):
        return f"the held-out loss is {loss}"
    if loss > corpus.unigram_entropy:
        return (
            f"the held-out loss {loss:.3f} is above the corpus's unigram entropy "
            f"{corpus.unigram_entropy:.3f} nats/token"
        )
    return None


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """A loss in nats/token as bits a byte of text; None where tokens are no text.

    >>> bits_per_byte(2.772588722239781, 4.0)
    1.0
    """
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
