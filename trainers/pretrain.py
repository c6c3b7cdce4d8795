"""The default trainer: one transformer from scratch to its horizon, and its held-out loss there."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from analysis.errors import InputError
from trainers.corpus import Batches, Corpus, HeldoutWindows, heldout_windows, load
from trainers.flops import flops_per_token
from trainers.optimizer import Optimizer
from trainers.schedule import cosine
from trainers.transformer import Transformer
from trainers.trial import Measurement, Progress, Trial

CURVE_POINTS = 40
HELDOUT_POINTS = 5
"""Points of the curve at which a part of the held-out set is evaluated as well."""
HELDOUT_PART = 256
"""Windows of that part: a sixteenth of the whole, so that curves stay under 3% of the time."""
EVALUATION_TOKENS = 4096
"""Tokens of an evaluation batch: larger ones fall out of a core's cache."""


class Pretrain:
    """Trains `trainers.transformer` on a corpus by the trial's hyperparameters. See `Trainer`."""

    def train(self, trial: Trial, workspace: Path) -> Iterator[Progress | Measurement]:
        """Yield the loss curve, then the measurement at the horizon. `workspace` is not used."""
        started = time.perf_counter()
        device = _device()
        if device.type == "cpu":
            torch.set_num_threads(1)  # a trial is one core: bit for bit the same result
        corpus = _load_verified(trial)
        held = heldout_windows(corpus, trial.shape.context)
        model = Transformer(trial.shape, trial.seed).to(device)
        run = _Run(trial, corpus, held, model, device)
        curve: list[Progress] = []
        for point in run.points():
            curve.append(point)
            yield point
        reason = run.non_finite
        loss = stderr = None
        if reason is None:
            loss, stderr = evaluate(model, held, device)
            reason = _diverged(loss, corpus)
            curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
        text = corpus.bytes_per_token
        yield Measurement(
            tokens=trial.tokens,
            status="complete" if reason is None else "diverged",
            reason=reason,
            loss=loss,
            loss_stderr=stderr,
            bits_per_byte=None if text is None or loss is None else loss / np.log(2) / text,
            seconds=time.perf_counter() - started,
            mfu=curve[-1].flops / run.training_seconds / peak_flops(device),
            device=_device_name(device),
            curve=tuple(curve),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("isoflop", "torch", "numpy")},
            },
        )


@dataclass
class _Run:
    """The training loop with its state."""

    trial: Trial
    corpus: Corpus
    heldout: HeldoutWindows
    model: Transformer
    device: torch.device
    training_seconds: float = 0.0
    non_finite: str | None = None

    def points(self) -> Iterator[Progress]:
        """Train to the horizon, yielding the curve; stop early once the loss is not finite."""
        h, shape = self.trial.hyperparameters, self.trial.shape
        optimizer = Optimizer(self.model, h)
        batches = Batches(
            self.corpus,
            context=shape.context,
            sequences=h.batch_tokens // shape.context,
            seed=self.trial.seed,
        )
        part = heldout_windows(self.corpus, shape.context, HELDOUT_PART)
        marks = _marks(h.steps, CURVE_POINTS)
        heldout_marks = _marks(h.steps, HELDOUT_POINTS)
        total = torch.zeros((), device=self.device)
        last = 0
        clock = time.perf_counter()
        for step in range(1, h.steps + 1):
            loss = self.model.loss(torch.from_numpy(batches.batch(step - 1)).to(self.device))
            # Torch leaves backward() and apply() untyped.
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            optimizer.step(
                cosine(
                    step - 1,
                    steps=h.steps,
                    warmup_steps=h.warmup_steps,
                    final_fraction=h.final_fraction,
                )
            )
            if step not in marks:
                continue
            mean = total.item() / (step - last)
            self.training_seconds += time.perf_counter() - clock
            held = None
            if not np.isfinite(mean):
                self.non_finite = f"the training loss was {mean} before step {step} of {h.steps}"
            elif step in heldout_marks and step < h.steps:
                held, _ = evaluate(self.model, part, self.device)
            tokens = step * h.batch_tokens
            yield Progress(
                step=step,
                tokens=tokens,
                flops=tokens * flops_per_token(shape),
                train_loss=mean,
                heldout_loss=held,
            )
            if self.non_finite:
                return
            total.zero_()
            last = step
            clock = time.perf_counter()


def evaluate(
    model: Transformer, heldout: HeldoutWindows, device: torch.device
) -> tuple[float, float | None]:
    """Held-out loss and its standard error, nats/token; None where all is one segment.

    Windows of one segment share its style, so they are one cluster: the error is that of a ratio
    estimate over segments, not over windows, which would be too small.
    """
    context = heldout.windows.shape[1] - 1
    size = max(1, EVALUATION_TOKENS // context)
    # Written in place: a list of small results pins every piece's freed buffers between them in the
    # heap, 155 MB at context 64.
    sums = torch.empty(len(heldout.windows), device=device)
    for start in range(0, len(sums), size):
        windows = torch.from_numpy(heldout.windows[start : start + size]).to(device)
        sums[start : start + size] = model.token_losses(windows).sum(1)
    by_window = sums.double().cpu().numpy() / context
    loss = float(by_window.mean())
    used = len(np.unique(heldout.segment))
    if used < 2:  # one cluster says nothing of how clusters differ
        return loss, None
    segments = np.bincount(heldout.segment, by_window - loss)
    return loss, float(np.sqrt(used / (used - 1) * (segments**2).sum()) / len(by_window))


@lru_cache(maxsize=4)
def peak_flops(device: torch.device) -> float:
    """Measured peak FLOP/s of `device` in fp32: the best of 30 matmuls of 1024^3."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    best = float("inf")
    for _ in range(30):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * 1024**3 / best)


def _load_verified(trial: Trial) -> Corpus:
    if trial.corpus.source is None:
        raise InputError(f"trial {trial.key} has no corpus, and pretraining needs one")
    corpus = load(trial.corpus.source)
    # A remote corpus is known by its declaration until it has been downloaded.
    if trial.corpus.source.kind == "hugging_face":
        return corpus
    if corpus.hashes != (trial.corpus.hash, trial.corpus.heldout_hash):
        raise InputError(
            f"corpus {corpus.name} here has hash {corpus.hashes[0]}, but the trial was planned "
            f"with {trial.corpus.hash}: the text changed, or this machine has another Python"
        )
    return corpus


def _diverged(loss: float, corpus: Corpus) -> str | None:
    if not np.isfinite(loss):
        return f"the held-out loss is {loss}"
    if loss > corpus.unigram_entropy:
        return (
            f"the held-out loss {loss:.3f} is above the corpus's unigram entropy "
            f"{corpus.unigram_entropy:.3f} nats/token"
        )
    return None


def _marks(steps: int, count: int) -> set[int]:
    return {round(steps * (i + 1) / count) for i in range(count)} - {0}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, 1 thread"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
