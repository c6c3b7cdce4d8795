"""The default trainer: one transformer from scratch to its horizons, and its held-out loss there.

A cosine training has one horizon. A trunk (schedule `wsd`) goes on at a constant rate; at each
horizon a branch leaves it, decays, is measured and is forgotten.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Collection, Iterator
from functools import partial
from importlib.metadata import version

import torch

from analysis.errors import InputError
from trainers.corpus import Batches, Corpus, HeldoutWindows, domain_windows, heldout_windows, load
from trainers.device import (
    device_name,
    peak_flops,
    reproducible,
    synchronise,
    this_device,
)
from trainers.evaluation import bits_per_byte, diverged
from trainers.flops import flops_per_token
from trainers.learner import Learner
from trainers.models import write_model
from trainers.ranks import Ranks, joined
from trainers.schedule import branch, cosine, trunk
from trainers.states import (
    Place,
    State,
    Tensors,
    read_state,
    state_from_dict,
    state_to_dict,
    write_state,
)
from trainers.trial import DomainLoss, Event, Measurement, Progress, Step, Trial
from trainers.workspace import Workspace, resume

CURVE_POINTS = 40
"""Of a curve; of a trunk's, in each of the hyperparameters' `steps`, however long it goes on."""
HELDOUT_POINTS = 5
"""Those at which a part of the held-out set is evaluated as well."""
BRANCH_POINTS, BRANCH_HELDOUT_POINTS = 8, 4
"""Of the decay of a horizon of a trunk."""
HELDOUT_PART = 256
"""Windows of that part: a sixteenth of the whole, so that curves stay under 3% of the time."""


class Pretrain:
    """Trains `trainers.transformer` on a corpus by the trial's hyperparameters. See `Trainer`."""

    def __init__(self, *, sharded: bool | None = None) -> None:
        """Of several ranks each has its shards of the model, or all; None: as its size demands."""
        self._sharded = sharded

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        """Yield every step and the loss curve, and a measurement at each horizon."""
        started = time.perf_counter()
        device = this_device()
        if device.type == "cpu":
            torch.set_num_threads(1)  # a trial is one core: bit for bit the same result
        with reproducible(device, trial.deterministic), joined(device) as ranks:
            _require_shares(trial, ranks)
            corpus = _load_verified(trial)
            halvings = ranks.from_first(workspace.out_of_memory())
            learner = Learner(
                trial,
                device,
                ranks,
                sharded=self._sharded,
                halvings=halvings,
                tell=workspace.tell,
            )
            with workspace.paused():  # that nothing is learnt meanwhile is no silence
                learner.prepare()
            run = _Run(trial, corpus, learner, device, ranks, started)
            run.resume(workspace)
            for tokens in trial.measured_at:
                yield from run.events(tokens, workspace)
                yield run.measure(tokens, workspace)


class _Run:
    """The training loop with its state, which is what a checkpoint holds.

    No random state is part of it: batches are a function of the step, and nothing else is drawn.
    """

    def __init__(
        self,
        trial: Trial,
        corpus: Corpus,
        learner: Learner,
        device: torch.device,
        ranks: Ranks,
        started: float,
    ) -> None:
        context = trial.shape.context
        self._trial, self._corpus, self._learner = trial, corpus, learner
        self._device, self._ranks = device, ranks
        self._batches = Batches(
            corpus,
            context=context,
            sequences=trial.hyperparameters.batch_tokens // context,
            seed=trial.seed,
        )
        self._heldout = heldout_windows(corpus, context)
        self._part = heldout_windows(corpus, context, HELDOUT_PART)
        self._started = started
        """On this process's clock; earlier attempts' seconds are taken off it."""
        self._training_seconds = 0.0
        self._position = 0
        """Steps that the model as it is has seen."""
        self._done = 0
        """Steps done for the trial, those of branches included."""
        self._decaying_to: int | None = None
        """The horizon of the branch that this is, steps; None on the trunk."""
        self._trunk: tuple[Place, Tensors] | None = None
        """Where that branch left the trunk, and the learner's state there."""
        self._curve: list[Progress] = []
        self._non_finite: str | None = None
        self._total = torch.zeros((), device=device)
        """This rank's part of the sum of the training losses since the last point of the curve."""
        self._told = 0, 0.0, 0.0
        """What the last row accounts for: steps done, seconds, seconds of training."""
        self._compiled = 0.0
        """What the last row accounts for of the seconds to compile, which are in no others."""
        self._begun_at = 0
        """Steps done before those that this attempt does for its next measurement."""
        self._ahead = trial.measured_at
        """Horizons that are still to be measured."""
        self._resumed_from = 0

    def events(self, tokens: int, workspace: Workspace) -> Iterator[Step | Progress]:
        """Train to a horizon, saving what is due; stop early once the loss is not finite."""
        h = self._trial.hyperparameters
        end, leaves = tokens // h.batch_tokens, self._trial.decay_start(tokens)
        if h.schedule == "wsd" and self._decaying_to is None:
            # None for the horizon: a trunk's curve is the same whichever horizons it has.
            marks = partial(_marks, 0, h.steps, leaves)
            yield from self._until(leaves, marks(CURVE_POINTS), marks(HELDOUT_POINTS), workspace)
            if self._non_finite is not None:
                return
            self._trunk, self._decaying_to = (self._place(), self._learner.state()), end
            if tokens == self._trial.tokens:
                self._save(workspace)  # where a further horizon would begin
        if self._decaying_to is None:
            marks, points, heldout = partial(_marks, 0, end, end), CURVE_POINTS, HELDOUT_POINTS
        else:
            marks = partial(_marks, leaves, end - leaves, end)
            points, heldout = BRANCH_POINTS, BRANCH_HELDOUT_POINTS
        yield from self._until(end, marks(points), marks(heldout) - {end}, workspace)

    def measure(self, tokens: int, workspace: Workspace) -> Measurement:
        """What the model as it is gives; the model is kept. Then back to the trunk."""
        curve, reason = self._curve, self._non_finite
        loss = stderr = None
        if reason is None:
            found = self._learner.evaluate(self._heldout)
            reason = diverged(found[0], self._corpus)
            if math.isfinite(found[0]):
                loss, stderr = found
                curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
        text, now = self._corpus.bytes_per_token, self._seconds
        steps, seconds, training = self._told
        flops = (self._done - steps) * self._flops_per_step
        peak = peak_flops(self._device, self._trial.hyperparameters.precision) * self._ranks.count
        measured = Measurement(
            tokens=tokens,
            status="complete" if reason is None else "diverged",
            reason=reason,
            loss=loss,
            loss_stderr=stderr,
            bits_per_byte=None if loss is None else bits_per_byte(loss, text),
            domains=() if loss is None else self._by_domain(),
            seconds=now - seconds,
            mfu=flops / max(1e-9, self._training_seconds - training) / peak,
            device=device_name(self._device, self._ranks.count),
            curve=tuple(curve),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("isoflop", "torch", "numpy")},
            },
            steps=self._done - self._begun_at,
            resumed_from=self._resumed_from,
            flops_spent=flops,
            compile_seconds=self._compile_seconds,
        )
        if loss is not None:
            clock = time.perf_counter()
            self._keep(tokens, loss, workspace)
            self._started += time.perf_counter() - clock  # training and evaluation alone count
        self._told, self._begun_at = (self._done, now, self._training_seconds), self._done
        self._compiled = self._learner.compile_seconds
        self._ahead = tuple(further for further in self._ahead if further > tokens)
        if self._trunk is not None:
            self._become(*self._trunk)
            self._non_finite = None
        return measured

    def _keep(self, tokens: int, loss: float, workspace: Workspace) -> None:
        """Have the first rank leave the weights that were measured; shards are gathered by all."""
        if not self._ranks.from_first(workspace.keeps_models):
            return
        weights = self._learner.weights()
        if self._ranks.rank == 0:
            write = partial(write_model, trial=self._trial, tokens=tokens, loss=loss)
            text = self._corpus.tokenizer
            workspace.keep_model(tokens, partial(write, tokenizer=text, weights=weights))

    def _by_domain(self) -> tuple[DomainLoss, ...]:
        found = []
        for name, domain in self._corpus.domains.items():
            windows = domain_windows(domain, self._trial.shape.context)
            loss, stderr = self._learner.evaluate(windows)
            bits = bits_per_byte(loss, domain.bytes_per_token)
            found.append(DomainLoss(name=name, loss=loss, loss_stderr=stderr, bits_per_byte=bits))
        return tuple(found)

    @property
    def _compile_seconds(self) -> float | None:
        """Seconds of compiling since the last row; None for a compiled training that had none."""
        seconds = self._learner.compile_seconds - self._compiled
        return None if self._learner.compiles and not seconds else seconds

    @property
    def _seconds(self) -> float:
        """Seconds of training and evaluation so far, in all attempts, without compiling."""
        return time.perf_counter() - self._started - self._learner.compile_seconds

    @property
    def _flops_per_step(self) -> float:
        h = self._trial.hyperparameters
        return flops_per_token(self._trial.shape) * h.batch_tokens

    def _until(
        self, end: int, points: Collection[int], heldout: Collection[int], workspace: Workspace
    ) -> Iterator[Step | Progress]:
        """Train on to a step, with points of the curve, and at some of them a held-out loss."""
        while self._position < end and self._non_finite is None:
            clock = time.perf_counter() - self._learner.compile_seconds
            self._total += self._learner.step(self._batches.batch(self._position), self._rate())
            self._position += 1
            self._done += 1
            mean = self._mean() if self._position in points else None
            compiled = self._learner.compile_seconds
            self._training_seconds += time.perf_counter() - compiled - clock
            if mean is not None:
                yield self._add_point(mean, self._part if self._position in heldout else None)
            due = self._ranks.from_first(workspace.due(self._done))
            if due and self._non_finite is None:
                self._save(workspace)
            yield Step(self._done)

    def _rate(self) -> float:
        """Of the next step, as a fraction of the peak."""
        h, step = self._trial.hyperparameters, self._position
        if h.schedule == "cosine":
            return cosine(
                step, steps=h.steps, warmup_steps=h.warmup_steps, final_fraction=h.final_fraction
            )
        if self._decaying_to is None:
            return trunk(step, warmup_steps=h.warmup_steps)
        steps = self._decaying_to
        decay = steps - self._trial.decay_start(steps * h.batch_tokens)
        return branch(step, steps=steps, decay=decay, final_fraction=h.final_fraction)

    def _mean(self) -> float:
        """Mean training loss since the last point, nats/token; begins the next one's sum."""
        since = self._curve[-1].step if self._curve else 0
        mean = self._ranks.sum_(self._total).item() / (self._position - since)
        self._total.zero_()
        return mean

    def _add_point(self, mean: float, part: HeldoutWindows | None) -> Progress:
        h = self._trial.hyperparameters
        if not math.isfinite(mean):
            self._non_finite = f"the training loss was {mean} before step {self._position}"
            part = None
        loss = None
        if part is not None:
            found, _ = self._learner.evaluate(part)
            loss = found if math.isfinite(found) else None
        tokens = self._position * h.batch_tokens
        point = Progress(
            step=self._position,
            tokens=tokens,
            flops=tokens * flops_per_token(self._trial.shape),
            train_loss=mean,
            heldout_loss=loss,
        )
        self._curve.append(point)
        return point

    def resume(self, workspace: Workspace) -> None:
        """Go to the newest checkpoint that can be read and from which all horizons are ahead."""
        found: tuple[State, dict[str, Tensors]] | None = None
        paid = False
        if self._ranks.rank == 0:
            found = resume(workspace, partial(read_state, key=self._trial.key), self._is_before)
            paid = found is not None and self._is_paid(found[0], workspace)
        data, paid = self._ranks.from_first((found and state_to_dict(found[0]), paid))
        if data is None:
            return
        state = state_from_dict(data)
        tensors = found[1] if found else {}
        self._done = self._begun_at = self._resumed_from = state.done
        self._training_seconds = state.training_seconds
        self._started -= state.seconds
        self._told = (state.done, state.seconds, state.training_seconds) if paid else state.told
        if state.trunk is None:
            self._become(state.here, self._rank_part(tensors, "here"))
        elif self._is_over(state):
            self._become(state.trunk, self._rank_part(tensors, "trunk"))
        else:
            self._become(state.here, self._rank_part(tensors, "here"))
            self._trunk = state.trunk, self._rank_part(tensors, "trunk")

    def _rank_part(self, tensors: dict[str, Tensors], place: str) -> Tensors:
        """What of a checkpoint's tensors is this rank's; the first rank alone has read them."""
        return self._learner.scattered(tensors.pop(place, {}))

    def _is_before(self, found: tuple[State, dict[str, Tensors]]) -> bool:
        """Whether the horizons are ahead of where the trunk of a checkpoint is."""
        if self._trial.hyperparameters.schedule != "wsd":
            return True
        where = found[0].trunk or found[0].here
        return where.position <= self._trial.decay_start(self._trial.measured_at[0])

    def _is_over(self, state: State) -> bool:
        """Whether a checkpoint is of a branch to a horizon that is not wanted any more."""
        batch = self._trial.hyperparameters.batch_tokens
        to = state.here.decaying_to
        return to is not None and to * batch != self._trial.measured_at[0]

    def _is_paid(self, state: State, workspace: Workspace) -> bool:
        """Whether a row accounts for all up to a checkpoint: of a horizon that was ahead of it."""
        measured = set(state.ahead) - set(self._trial.measured_at)
        return any(workspace.measured(tokens) for tokens in sorted(measured))

    def _save(self, workspace: Workspace) -> None:
        """Have the first rank write it down; shards are gathered by all."""
        clock = time.perf_counter()
        synchronise(self._device)  # steps that were only queued so far
        self._training_seconds += time.perf_counter() - clock
        places = {"here": (self._place(), self._learner.state())}
        if self._trunk is not None:
            places["trunk"] = self._trunk
        tensors = {name: self._learner.gathered(own) for name, (_, own) in places.items()}
        state = State(
            here=places["here"][0],
            trunk=None if self._trunk is None else self._trunk[0],
            done=self._done,
            told=self._told,
            ahead=self._ahead,
            seconds=self._seconds,
            training_seconds=self._training_seconds,
        )
        if self._ranks.rank == 0:
            workspace.save(self._done, partial(write_state, state, tensors, key=self._trial.key))

    def _place(self) -> Place:
        return Place(
            position=self._position,
            decaying_to=self._decaying_to,
            total=self._ranks.sum_(self._total.clone()).item(),
            curve=tuple(self._curve),
        )

    def _become(self, place: Place, tensors: Tensors) -> None:
        """Go back to a place, with the learner's state there."""
        self._learner.restore(tensors)
        # Everybody's losses so far are in the first rank's sum, and in no other's.
        self._total.fill_(place.total if self._ranks.rank == 0 else 0.0)
        self._position, self._decaying_to = place.position, place.decaying_to
        self._curve, self._trunk = list(place.curve), None


def _load_verified(trial: Trial) -> Corpus:
    if trial.corpus.source is None:
        raise InputError(f"trial {trial.key} has no corpus, and pretraining needs one")
    corpus = load(trial.corpus.source)
    for part, here, planned in zip(
        ("", "a held-out part of "),
        corpus.hashes,
        (trial.corpus.hash, trial.corpus.heldout_hash),
        strict=True,
    ):
        if here != planned:
            raise InputError(
                f"corpus {corpus.name} here has {part}hash {here}, but the trial was planned with "
                f"{planned}: the text changed, or this machine has another Python; plan it again, "
                "or restore the text"
            )
    if corpus.vocabulary != trial.shape.vocabulary:
        raise InputError(
            f"corpus {corpus.name} has {corpus.vocabulary} symbols, but trial {trial.key} has a "
            f"vocabulary of {trial.shape.vocabulary}: plan it again with the corpus's tokenizer"
        )
    return corpus


def _marks(begin: int, span: int, end: int, count: int) -> set[int]:
    """Steps after `begin`, `count` of them evenly spread in each `span`, for as long as to `end`.

    The end does not move them. A divisor of the count gives some of the same.

    >>> sorted(_marks(0, 10, 25, 4))
    [2, 5, 8, 10, 12, 15, 18, 20, 22, 25]
    """
    last = math.ceil((end - begin) * count / span)
    steps = (begin + round(span * i / count) for i in range(1, last + 1))
    return {step for step in steps if begin < step <= end}


def _require_shares(trial: Trial, ranks: Ranks) -> None:
    sequences = trial.hyperparameters.batch_tokens // trial.shape.context
    if sequences < ranks.count:
        raise InputError(
            f"trial {trial.key} has {sequences} sequences a step, which {ranks.count} processes "
            "cannot share: give it fewer GPUs or a larger batch"
        )
