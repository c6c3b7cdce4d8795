"""EleutherAI's lm-eval on a model of ours: its questions, answered by the transformer itself.

Imports lm-eval, of the extra `eval`: only what evaluates imports this.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from analysis.errors import InputError
from trainers.scoring import TaskScore, continuations, scores
from trainers.tokenizer import BYTES, Tokenizer
from trainers.transformer import Transformer

LONGEST_ANSWER = 256
"""Tokens generated where a task says no number: as lm-eval has it for Hugging Face's models."""
BOOTSTRAPS = 1000
"""For the standard errors of what is no mean; lm-eval's 100,000 take minutes."""
VERSION = version("lm_eval")


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> list[TaskScore]:
    """What a model scores.

    Parameters
    ----------
    model
        Ours.
    tasks
        Names of lm-eval's tasks or groups, or of those in `include_path`.
    num_fewshot
        Worked examples before each question; None is as the task says.
    limit
        Questions of each task; None is all.
    include_path
        Directory of further tasks, YAML files.

    Raises
    ------
    InputError
        If there is no task of a name, or one asks for what is not offered.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        where = "" if include_path is None else f" nor in {include_path}"
        raise InputError(
            f"lm-eval {VERSION} has no task {', '.join(unknown)}{where}: "
            "`lm-eval ls tasks` lists its own, --include-path names a directory of others"
        )
    with redirect_stdout(sys.stderr):  # it prints of its progress
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    return [score for task in found["results"] for score in _scores(task, found)]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # it is untyped
    """A transformer and its corpus's tokenizer, as lm-eval asks models.

    Every text, question or prompt, begins after a separator, as documents do in training: that is
    what is forgotten first where the context is too short. A continuation of any length is scored;
    generation is greedy and ends at the separator, except that of bytes, whose separator is any
    line's end.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__()
        self._model = model.float() if device.type == "cpu" else model.to(device)  # no bf16 there
        self._tokenizer, self._device = tokenizer, device

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return self._tokenizer.separator

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Tokens of a text, without separators."""
        (tokens,) = self._tokenizer.encode([string.encode()])
        return [int(token) for token in tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self._begun(before), tokens) for _, before, tokens in requests]
        found = scores(self._model, pairs, self._device)
        return [(score.log_likelihood, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of whole texts, nats."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        pairs = [(self._begun([]), tokens) for tokens in texts]
        return [score.log_likelihood for score in scores(self._model, pairs, self._device)]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """How texts go on, up to the first of a task's stop words."""
        asked = [_Asked.of(*request.args) for request in requests]
        prompts = [self._begun(self.tok_encode(one.text)) for one in asked]

        def ended(i: int, said: list[int]) -> bool:
            over = bool(said) and said[-1] == self.eot_token_id and self._tokenizer != BYTES
            return over or len(said) >= asked[i].most or asked[i].stops(self._text(said))

        found = continuations(self._model, prompts, ended, self._device)
        return [one.cut(self._text(said)) for one, said in zip(asked, found, strict=True)]

    def _begun(self, tokens: list[int]) -> list[int]:
        """The beginning of a text; lm-eval itself gives an empty one as a separator."""
        end = self.eot_token_id
        return tokens if tokens[:1] == [end] else [end, *tokens]

    def _text(self, tokens: list[int]) -> str:
        own = tokens if self._tokenizer == BYTES else [t for t in tokens if t != self.eot_token_id]
        return self._tokenizer.decode(np.array(own, dtype=np.int64)).decode(errors="replace")


@dataclass(frozen=True)
class _Asked:
    """A text to go on with, and when to stop."""

    text: str
    most: int
    """Tokens."""
    until: tuple[str, ...]

    @staticmethod
    def of(text: str, how: Mapping[str, Any]) -> _Asked:
        if how.get("do_sample") or how.get("temperature"):
            raise InputError(
                "a task asks for sampled answers (do_sample or temperature), and answers here are "
                "the likeliest: set do_sample: false and temperature: 0 in its generation_kwargs"
            )
        until = how.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        return _Asked(text, int(how.get("max_gen_toks", LONGEST_ANSWER)), stops)

    def stops(self, said: str) -> bool:
        return any(stop in said for stop in self.until)

    def cut(self, said: str) -> str:
        for stop in self.until:
            said = said.partition(stop)[0]
        return said


def _scores(task: str, found: Mapping[str, Any]) -> list[TaskScore]:
    """A task's results: numbers by "metric,filter", with "metric_stderr,filter" beside them."""
    results = found["results"][task]
    better = found.get("higher_is_better", {}).get(task) or {}
    made = []
    for name, value in results.items():
        metric, comma, kind = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{kind}")
        documents = found.get("n-samples", {}).get(task) or {}
        made.append(
            TaskScore(
                task=task,
                task_version=str(found["versions"].get(task, "")),
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,
                higher_is_better=better.get(metric),
                num_fewshot=found.get("n-shot", {}).get(task),
                documents=documents.get("effective"),
            )
        )
    return made
