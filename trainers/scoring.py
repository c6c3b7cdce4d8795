"""What a trained model says of tokens: their log-likelihood, and how it goes on greedily.

For texts of any length: a model sees no more than its context, and at least one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trainers.flops import EVALUATION_TOKENS
from trainers.transformer import Transformer

Item = TypeVar("Item")


@dataclass(frozen=True)
class Score:
    """Of a continuation, after what came before it."""

    log_likelihood: float
    """Nats, of all its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest where it stands."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    task_version: str
    metric: str
    filter: str
    """How answers were read; `none` for as they are."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    """Worked examples before each question; None for a group of tasks that differ."""
    documents: int | None
    """Questions; None for a group."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of one continuation that are scored in one pass."""

    of: int
    """Which continuation."""
    window: list[int]
    """The tokens, after as many of those before them as the context holds."""
    count: int
    """Of the tokens."""


@torch.no_grad()
def scores(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> list[Score]:
    """Score each continuation after what is before it, which has at least one token.

    One that is longer than the context is scored in pieces, each after the tokens ahead of it that
    still fit: the last piece after as many as possible.
    """
    context = model.shape.context
    pieces = [
        piece
        for i, (before, tokens) in enumerate(pairs)
        for piece in _pieces(i, before, tokens, context)
    ]
    pieces.sort(key=lambda piece: -len(piece.window))  # those of a batch are about as long
    sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for batch in _batches(pieces, context):
        padded = _padded([piece.window for piece in batch], device)
        said = model(padded[:, :-1]).float().log_softmax(-1)
        for row, piece in enumerate(batch):
            end = len(piece.window) - 1
            own, targets = said[row, end - piece.count : end], padded[row, end - piece.count + 1 :]
            targets = targets[: piece.count]
            sums[piece.of] += own.gather(-1, targets[:, None]).double().sum().item()
            greedy[piece.of] &= bool((own.argmax(-1) == targets).all())
    return [Score(value, best) for value, best in zip(sums, greedy, strict=True)]


@torch.no_grad()
def continuations(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    ended: Callable[[int, list[int]], bool],
    device: torch.device,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, until `ended` says so of its number and tokens.

    A prompt has at least one token. What does not fit into the context is forgotten from its left.
    """
    context = model.shape.context
    said: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(range(len(prompts)), context):
        going = [i for i in batch if not ended(i, said[i])]
        while going:
            windows = [[*prompts[i], *said[i]][-context:] for i in going]
            last = torch.tensor([len(window) - 1 for window in windows], device=device)
            logits = model(_padded(windows, device))[torch.arange(len(going), device=device), last]
            for i, token in zip(going, logits.argmax(-1).tolist(), strict=True):
                said[i].append(token)
            going = [i for i in going if not ended(i, said[i])]
    return said


def _pieces(
    of: int, before: Sequence[int], tokens: Sequence[int], context: int
) -> Iterator[_Piece]:
    whole = [*before, *tokens]
    for start in range(len(before), len(whole), context):
        end = min(start + context, len(whole))
        yield _Piece(of, whole[max(0, end - context - 1) : end], end - start)


def _batches(items: Sequence[Item], context: int) -> Iterator[Sequence[Item]]:
    size = max(1, EVALUATION_TOKENS // context)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _padded(windows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """In one tensor: zeros behind a window change nothing in it, since attention is causal."""
    padded = torch.zeros(len(windows), max(map(len, windows)), dtype=torch.int64)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = torch.tensor(window)
    return padded.to(device)
