"""Scores and greedy continuations, against the model asked for one token at a time."""

import math

import pytest
import torch

from trainers.scoring import continuations, scores
from trainers.shape import Shape
from trainers.transformer import Transformer

CPU = torch.device("cpu")
CONTEXT = 12


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Of random weights, whose tokens are not all alike."""
    shape = Shape(width=32, depth=2, heads=2, vocabulary=23, context=CONTEXT)
    made = Transformer(shape, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return made


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(23, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _log_probabilities(model: Transformer, window: list[int]) -> torch.Tensor:
    """Of the token that follows a window, in double precision."""
    return model(torch.tensor([window]))[0, -1].double().log_softmax(-1)


@torch.no_grad()
def test_a_continuation_is_scored_token_by_token(model: Transformer) -> None:
    pairs = [(_tokens(a, a), _tokens(b, 50 + b)) for a, b in ((1, 1), (3, 5), (8, 4), (2, 0))]
    for (before, tokens), found in zip(pairs, scores(model, pairs, CPU), strict=True):
        expected = sum(
            float(_log_probabilities(model, before + tokens[:i])[token])
            for i, token in enumerate(tokens)
        )
        assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
    assert scores(model, pairs, CPU)[-1].greedy  # nothing is as likely as can be


def test_what_does_not_fit_is_scored_after_as_much_as_fits(model: Transformer) -> None:
    """A context of 12: 30 tokens are scored 12, 12 and 6 at a time, these after 7 before them."""
    before, tokens = _tokens(5, 1), _tokens(30, 2)
    whole = before + tokens
    (found,) = scores(model, [(before, tokens)], CPU)
    expected = 0.0
    for at in range(30):
        begin = min(12 * (at // 12 + 1), 30) + 5 - 13  # 13 tokens: 12 inputs and their targets
        expected += float(_log_probabilities(model, whole[begin : at + 5])[tokens[at]])
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_greedy_is_what_the_model_would_say(model: Transformer) -> None:
    prompts = [_tokens(n, n) for n in (1, 4, 11, 20)]
    said = continuations(model, prompts, lambda i, tokens: len(tokens) >= 3 + i, CPU)
    for i, (prompt, tokens) in enumerate(zip(prompts, said, strict=True)):
        expected: list[int] = []
        while len(expected) < 3 + i:
            window = (prompt + expected)[-CONTEXT:]
            expected.append(int(_log_probabilities(model, window).argmax()))
        assert tokens == expected
    first = [(prompts[0], said[0]), (prompts[0], [(said[0][0] + 1) % 23])]
    assert [score.greedy for score in scores(model, first, CPU)] == [True, False]


def test_probabilities_of_all_continuations_add_up_to_one(model: Transformer) -> None:
    pairs = [([3, 1, 4], [a, b]) for a in range(23) for b in range(23)]
    found = scores(model, pairs, CPU)
    assert math.fsum(math.exp(score.log_likelihood) for score in found) == pytest.approx(
        1, rel=1e-5
    )
    assert sum(score.greedy for score in found) == 1
