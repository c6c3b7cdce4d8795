"""The default trainer: one transformer from scratch to its horizon, and its held-out loss there."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.errors import InputError
from trainers.corpus import Batches, Corpus, HeldoutWindows, heldout_windows, load
from trainers.flops import EVALUATION_TOKENS, flops_per_token, pass_sequences
from trainers.optimizer import Optimizer
from trainers.schedule import cosine
from trainers.transformer import Transformer
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import UnreadableError, Workspace, resume, verify

CURVE_POINTS = 40
HELDOUT_POINTS = 5
"""Points of the curve at which a part of the held-out set is evaluated as well."""
HELDOUT_PART = 256
"""Windows of that part: a sixteenth of the whole, so that curves stay under 3% of the time."""
CHECKPOINT_VERSION = 1
"""Raise it whenever a checkpoint holds something else: older ones are then set aside."""


class Pretrain:
    """Trains `trainers.transformer` on a corpus by the trial's hyperparameters. See `Trainer`."""

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        """Yield every step and the loss curve, then the measurement at the horizon."""
        started = time.perf_counter()
        _refuse_ranks(trial)
        device = _device()
        if device.type == "cpu":
            torch.set_num_threads(1)  # a trial is one core: bit for bit the same result
        corpus = _load_verified(trial)
        held = heldout_windows(corpus, trial.shape.context)
        model = Transformer(trial.shape, trial.seed).to(device)
        run = _Run(trial, corpus, model, device, started)
        resumed_from = run.resume(workspace)
        yield from run.events(workspace)
        curve, reason = run.curve, run.non_finite
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
            seconds=time.perf_counter() - run.started,
            mfu=curve[-1].flops / run.training_seconds / peak_flops(device),
            device=_device_name(device),
            curve=tuple(curve),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("isoflop", "torch", "numpy")},
            },
            steps=run.step - resumed_from,
            resumed_from=resumed_from,
        )


class _Run:
    """The training loop with its state, which is what a checkpoint holds.

    No random state is part of it: batches are a function of the step, and nothing else is drawn.
    """

    def __init__(
        self,
        trial: Trial,
        corpus: Corpus,
        model: Transformer,
        device: torch.device,
        started: float,
    ) -> None:
        self._trial, self._corpus, self._model, self._device = trial, corpus, model, device
        self._optimizer = Optimizer(model, trial.hyperparameters)
        self.started = started
        """On this process's clock; earlier attempts' seconds are taken off it."""
        self.training_seconds = 0.0
        self.step = 0
        self.curve: list[Progress] = []
        self.non_finite: str | None = None
        self._total = torch.zeros((), device=device)
        """Sum of the training losses since the last point of the curve."""

    def events(self, workspace: Workspace) -> Iterator[Step | Progress]:
        """Train to the horizon, saving what is due; stop early once the loss is not finite."""
        h, shape = self._trial.hyperparameters, self._trial.shape
        batches = Batches(
            self._corpus,
            context=shape.context,
            sequences=h.batch_tokens // shape.context,
            seed=self._trial.seed,
        )
        part = heldout_windows(self._corpus, shape.context, HELDOUT_PART)
        marks = _marks(h.steps, CURVE_POINTS)
        heldout_marks = _marks(h.steps, HELDOUT_POINTS) - {h.steps}
        while self.step < h.steps and self.non_finite is None:
            clock = time.perf_counter()
            self._train_on(batches.batch(self.step))
            mean = self._mean() if self.step in marks else None
            self.training_seconds += time.perf_counter() - clock
            if mean is not None:
                yield self._add_point(mean, part if self.step in heldout_marks else None)
            if workspace.due(self.step) and self.non_finite is None:
                self._save(workspace)
            yield Step(self.step)

    def resume(self, workspace: Workspace) -> int:
        """Go to the newest readable checkpoint; returns its step, 0 where there is none."""
        state = resume(workspace, partial(_read, key=self._trial.key))
        if state is not None:
            self._optimizer.restore(state["optimizer"])
            self._total.copy_(state["total"])
            self.step = state["step"]
            self.curve = [Progress(**point) for point in state["curve"]]
            self.training_seconds = state["training_seconds"]
            self.started -= state["seconds"]
        return self.step

    def _save(self, workspace: Workspace) -> None:
        clock = time.perf_counter()
        _synchronise(self._device)  # steps that were only queued so far
        self.training_seconds += time.perf_counter() - clock
        state = {
            "version": CHECKPOINT_VERSION,
            "key": self._trial.key,
            "optimizer": self._optimizer.state(),
            "total": self._total.cpu(),
            "step": self.step,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "training_seconds": self.training_seconds,
            "seconds": time.perf_counter() - self.started,
        }
        workspace.save(self.step, partial(_write, state))

    def _train_on(self, windows: NDArray[np.int64]) -> None:
        h = self._trial.hyperparameters
        self._total += accumulate(self._model, torch.from_numpy(windows).to(self._device))
        self._optimizer.step(
            cosine(
                self.step,
                steps=h.steps,
                warmup_steps=h.warmup_steps,
                final_fraction=h.final_fraction,
            )
        )
        self.step += 1

    def _mean(self) -> float:
        """Training loss since the last point, nats/token; begins the next one's sum."""
        mean = self._total.item() / (self.step - (self.curve[-1].step if self.curve else 0))
        self._total.zero_()
        return mean

    def _add_point(self, mean: float, part: HeldoutWindows | None) -> Progress:
        h = self._trial.hyperparameters
        if not np.isfinite(mean):
            self.non_finite = f"the training loss was {mean} before step {self.step} of {h.steps}"
            part = None
        tokens = self.step * h.batch_tokens
        point = Progress(
            step=self.step,
            tokens=tokens,
            flops=tokens * flops_per_token(self._trial.shape),
            train_loss=mean,
            heldout_loss=None if part is None else evaluate(self._model, part, self._device)[0],
        )
        self.curve.append(point)
        return point


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # Torch's own error hides what the file system said, such as that it is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _read(path: Path, key: str) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises anything, OSError too, depending on the bytes
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise UnreadableError(f"torch cannot read it ({type(error).__name__}: {reason})") from error
    return verify(content, key=key, version=CHECKPOINT_VERSION)


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


def accumulate(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    """Add the gradient of the mean loss on `windows`, in passes of at most `PASS_TOKENS`.

    Returns
    -------
    The mean loss, nats/token.
    """
    parts = torch.split(windows, pass_sequences(model.shape.context))
    total = torch.zeros((), device=windows.device)
    for part in parts:
        loss = model.loss(part)
        if len(parts) > 1:
            loss = loss * (len(part) / len(windows))
        # Torch leaves backward() untyped.
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


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


def _refuse_ranks(trial: Trial) -> None:
    ranks = os.environ.get("WORLD_SIZE") or "1"
    if ranks != "1":
        raise InputError(
            f"the trainer pretrain runs on one process, but WORLD_SIZE is {ranks}: place trial "
            f"{trial.key} on one GPU, or unset WORLD_SIZE"
        )


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
