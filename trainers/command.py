"""A trainer that runs the user's own training program, and hears what it says.

How a program is started and ended is in `trainers.child`, what it may say in `trainers.told`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis.errors import InputError
from trainers.archive import pack, unpack
from trainers.child import Child, Line
from trainers.flops import flops_per_token, params
from trainers.shape import DIMENSIONS
from trainers.template import GRANTED, NODE_GPUS, Command, expand, file_hash
from trainers.told import CommandError, Point, ProtocolError, Result, Saved, heard
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.visible_gpus import visible_variable
from trainers.workspace import Workspace, resume

GRACE_SECONDS = 30.0
"""For a program that is asked to end, to write a checkpoint. The driver waits for 120 s."""
SHOWN = 60
"""Characters of a command that an error shows."""
LEAST_SECRET = 8
"""Characters of a value, or of a line of it, of `env_from` that is masked in what a program prints:
shorter ones, such as a number of threads, would mask parts of what it says."""


class Commanded:
    """Runs the trial's command in a scratch place of its own. See `Trainer`.

    On several ranks each runs the command, with the environment of `torch.distributed`.
    """

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        """Yield the progress that the program tells, and what it measured once it has ended."""
        command = trial.command
        if command is None:
            raise InputError(f"trial {trial.key} has no command, and its trainer runs one")
        _verify_files(command)
        require_variables(command)
        run = _Run(trial, command, workspace)
        with run.place(), run.start() as child:
            try:
                yield from run.events(child)
            except (GeneratorExit, CommandError) as error:
                run.end(child, gently=isinstance(error, GeneratorExit))
                raise
        if run.leads:
            yield run.measurement()


def require_variables(command: Command) -> None:
    """Check that this process has every variable that the program is to be given.

    Raises
    ------
    InputError
        If one is missing, by its name.
    """
    missing = [name for name in command.env_from if name not in os.environ]
    if missing:
        raise InputError(
            f"command.env_from names {', '.join(missing)}, and the environment on "
            f"{socket.gethostname()} has no such variable: set it there before isoflop starts, on "
            "a cluster before Ray starts, on every node"
        )


def values(trial: Trial, base: Path) -> dict[str, str]:
    """What stands for each of `template.PLACEHOLDERS`; paths are below `base`."""
    h, shape = trial.hyperparameters, trial.shape
    found: dict[str, Any] = {
        **{name: getattr(shape, name) for name in DIMENSIONS},
        "tokens": trial.tokens,
        "steps": h.steps,
        "batch_tokens": h.batch_tokens,
        "sequences": h.batch_tokens // shape.context,
        "learning_rate": h.matrix_rate,
        "final_learning_rate": h.matrix_rate * h.final_fraction,
        "warmup_steps": h.warmup_steps,
        "beta1": h.beta1,
        "beta2": h.beta2,
        "weight_decay": h.weight_decay,
        "clip": h.clip,
        "seed": trial.seed,
        "checkpoint": base / "checkpoint",
        "directory": base / "scratch",
        "result": base / "result.jsonl",
        "python": sys.executable,
    }
    return {name: str(value) for name, value in found.items()}


class _Run:
    """One attempt: what the program has told so far, and its checkpoints."""

    def __init__(self, trial: Trial, command: Command, workspace: Workspace) -> None:
        self._trial, self._command, self._workspace = trial, command, workspace
        rank = os.environ.get("RANK", "0")
        self.leads = rank == "0"
        """Whether this rank is heard."""
        self._base = workspace.directory.absolute() / f"command-{rank}"
        self._values = values(trial, self._base)
        self._checkpoint = Path(self._values["checkpoint"])
        given = [line for name in command.env_from for line in os.environ[name].splitlines()]
        # The longest first: one may contain another.
        self._secrets = sorted((s for s in given if len(s) >= LEAST_SECRET), key=len, reverse=True)
        self._began = self._started = time.monotonic()
        self._resumed_from = self._step = 0
        self._told_step: int | None = None
        """The last one of this attempt."""
        self._curve: dict[int, Progress] = {}
        self._evaluations: dict[int, float] = {}
        """Held-out losses by step, as they were told in progress."""
        self._tokens: dict[int, int] = {}
        """Tokens by step, where this attempt told of them."""
        self._result: Result | None = None
        self._diverged: str | None = None
        self._pending: tuple[int, int] | None = None
        """Step of the newest checkpoint not kept yet, and when the program told of it."""
        self._due = False

    @contextmanager
    def place(self) -> Iterator[None]:
        """Make the place where the program works, with its newest readable checkpoint; clear it."""
        shutil.rmtree(self._base, ignore_errors=True)
        try:
            self._restore()
            yield
        finally:
            shutil.rmtree(self._base, ignore_errors=True)

    def _restore(self) -> None:
        for name in ("checkpoint", "directory"):
            Path(self._values[name]).mkdir(parents=True)
        state = resume(self._workspace, partial(unpack, to=self._checkpoint, key=self._trial.key))
        if state is not None:
            self._resumed_from = self._step = state["step"]
            self._curve = {point["step"]: Progress(**point) for point in state["curve"]}
            self._evaluations = {
                step: point.heldout_loss
                for step, point in self._curve.items()
                if point.heldout_loss is not None
            } | dict(state.get("evaluations", ()))
            self._started -= state["seconds"]

    def start(self) -> Child:
        """Start the program."""
        command = self._command
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if gpus := env.pop(NODE_GPUS, ""):  # one of several ranks, among which LOCAL_RANK chooses
            env[visible_variable(env)] = gpus
        if not command.gpus:
            env["OMP_NUM_THREADS"] = "1"  # a trial is one core
            if env.get(GRANTED) == "0":  # others are given what GPUs there are
                env["CUDA_VISIBLE_DEVICES"] = env["HIP_VISIBLE_DEVICES"] = ""
        env |= {name: expand(value, self._values) for name, value in command.env}
        return Child(
            [expand(word, self._values) for word in command.run],
            env=env,
            directory=Path(command.directory),
            file=Path(self._values["result"]),
        )

    def events(self, child: Child) -> Iterator[Step | Progress]:
        """Yield the program's reports until it succeeds, diverges or has been asked to stop.

        Raises
        ------
        CommandError
            If it says what is wrong, takes too long, ends badly or without a result.
        """
        limit = self._command.timeout_seconds
        for line in child.lines():
            if limit is not None and time.monotonic() - self._began > limit:
                raise CommandError(f"it ran for more than command.timeout_seconds = {limit:g}")
            told = self._hear(line) if line is not None else None
            if isinstance(told, Point):
                yield from self._progress(told)
            elif isinstance(told, Saved):
                self._keep_what_is_due(self._step)
                yield Step(self._step)
            elif told is None and self._workspace.stopping():  # nothing of it is waited for
                yield Step(self._step)
            if self._diverged:
                return
        self._require_good_end(child)

    def end(self, child: Child, *, gently: bool) -> None:
        """Keep what the program has written, after it was asked to write it if that is meant."""
        if gently:
            for line in child.stop(GRACE_SECONDS):
                try:
                    self._hear(line)
                except CommandError as error:
                    print(f"isoflop: {error}")
        self._keep_what_is_due(self._step, at_once=True)

    def measurement(self) -> Measurement:
        """What was measured, with the whole curve on the scale of the FLOPs that were told."""
        trial, told = self._trial, self._result
        counted, flops = self._counted()
        ours = flops_per_token(trial.shape) * trial.tokens
        curve = [
            dataclasses.replace(self._curve[step], flops=self._curve[step].flops * flops / ours)
            for step in sorted(self._curve)
        ]
        reason, loss = self._diverged, None
        if told is not None and reason is None:
            reason = self._why_diverged(told)
            loss = told.loss if reason is None else None
        if loss is not None and curve and curve[-1].tokens == trial.tokens:
            curve[-1] = dataclasses.replace(curve[-1], heldout_loss=loss)
        return Measurement(
            tokens=trial.tokens,
            status="complete" if reason is None else "diverged",
            reason=reason,
            loss=loss,
            loss_stderr=told.loss_stderr if told and loss is not None else None,
            bits_per_byte=told.bits_per_byte if told and loss is not None else None,
            seconds=time.monotonic() - self._started,
            mfu=None,
            device=(told.device if told else None) or self._device(),
            curve=tuple(curve),
            versions={"python": platform.python_version(), "isoflop": version("isoflop")},
            loss_step=self._loss_step() if loss is not None else None,
            steps=(trial.hyperparameters.steps if told else self._step) - self._resumed_from,
            resumed_from=self._resumed_from,
            params=counted or None,
            flops=flops if flops != ours else None,
        )

    def _hear(self, line: Line) -> Point | Saved | Result | None:
        """What a line tells, once it has been found to make sense; log is passed on."""
        line = self._masked(line)
        told = heard(line.text) if self.leads and line.source != "errors" else None
        match told:
            case None:
                print(line.text)
            case Point(step=step):
                self._require_step(step)
            case Saved(checkpoint=step):
                self._require_step(step, goes_back=True)
                self._step = max(self._step, step)
                self._pending = step, line.read_ns
            case Result():
                if self._result not in (None, told):
                    raise ProtocolError(f"it gave a second result, {line.text!r}")
                self._require_horizon(told)
                self._result = told
        return told

    def _masked(self, line: Line) -> Line:
        """Return a line without the values of `env_from`: logs and errors are kept in projects."""
        text = line.text
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return line if text == line.text else dataclasses.replace(line, text=text)

    def _progress(self, told: Point) -> Iterator[Step | Progress]:
        h = self._trial.hyperparameters
        if self._told_step is None and told.step < self._resumed_from:
            print(f"isoflop: it did not go on from its checkpoint at step {self._resumed_from}")
            self._resumed_from = 0
            self._curve = {step: p for step, p in self._curve.items() if step < told.step}
            self._evaluations = {s: v for s, v in self._evaluations.items() if s < told.step}
        self._step = self._told_step = told.step
        if told.heldout_loss is not None:
            self._evaluations[told.step] = told.heldout_loss
        if told.tokens is not None:
            self._tokens[told.step] = told.tokens
        earlier = self._curve.get(told.step)
        train_loss = told.train_loss
        if train_loss is None and earlier is not None:
            train_loss = earlier.train_loss
        if train_loss is not None:
            tokens = earlier.tokens if earlier else told.step * h.batch_tokens
            tokens = self._tokens.get(told.step, tokens)
            point = Progress(
                step=told.step,
                tokens=tokens,
                flops=tokens * flops_per_token(self._trial.shape),
                train_loss=train_loss,
                heldout_loss=self._evaluations.get(told.step),  # perhaps of an earlier line
            )
            if not math.isfinite(train_loss):
                self._diverged = (
                    f"the training loss was {train_loss} at step {told.step} of {h.steps}"
                )
            yield point
            if told.step:  # before the first step nothing was spent
                self._curve[told.step] = point
        if told.step:
            self._keep_what_is_due(told.step)
        if told.step or train_loss is None:  # which is a sign of life, too
            yield Step(told.step)

    def _keep_what_is_due(self, step: int, *, at_once: bool = False) -> None:
        """Store the newest checkpoint of the program's, if one is due and it has a new one."""
        asked = self._workspace.due(step)  # always: an interrupt is heard by asking
        self._due = at_once or self._due or asked
        if not self._due or self._pending is None or self._diverged:
            return
        (saved, told_ns), self._pending = self._pending, None
        state = {
            "key": self._trial.key,
            "step": saved,
            "curve": [dataclasses.asdict(p) for s, p in self._curve.items() if s <= saved],
            "evaluations": [(s, loss) for s, loss in self._evaluations.items() if s <= saved],
            "seconds": time.monotonic() - self._started,
        }
        try:
            self._workspace.save(saved, partial(pack, self._checkpoint, told_ns, state))
            self._due = False
        except OSError as error:
            print(f"isoflop: the checkpoint at step {saved} is not kept: {error}")

    def _require_step(self, step: int, *, goes_back: bool = False) -> None:
        steps = self._trial.hyperparameters.steps
        if step > steps + 1:  # some count from 0, some from 1
            raise ProtocolError(
                f"it told of step {step}, but the trial has {steps} steps: give it {{steps}}"
            )
        if not goes_back and self._told_step is not None and step < self._told_step:
            raise ProtocolError(f"it told of step {step} after step {self._told_step}")

    def _require_horizon(self, told: Result) -> None:
        trial, batch = self._trial, self._trial.hyperparameters.batch_tokens
        if told.tokens is None or told.status == "diverged":
            return
        if abs(told.tokens - trial.tokens) > batch:
            raise ProtocolError(
                f"its result is of {told.tokens:,} tokens, but the trial's horizon is "
                f"{trial.tokens:,}, of which it may be a batch off ({batch:,}): give it {{tokens}}"
            )

    def _require_last_step(self, told: Result) -> None:
        """Where the result says no tokens, progress must have come to the last step."""
        steps = self._trial.hyperparameters.steps
        went_well = told.status == "complete" and math.isfinite(told.loss or math.nan)
        if told.tokens is not None or not went_well:
            return
        last = max([*self._curve, *self._evaluations], default=None)
        if last is None or last < steps - 1:  # some count from 0
            came = "it told of none" if last is None else f"the last one that it told of is {last}"
            raise ProtocolError(
                f"of {steps} steps {came}, and its result does not say after how many tokens it "
                'is: add "tokens" to the result, or tell of the last step'
            )

    def _require_fresh(self, told: Result) -> None:
        """Refuse a loss that was measured before the last step, of a model that is another one."""
        steps, last = self._trial.hyperparameters.steps, max(self._evaluations, default=None)
        if told.status == "diverged" or last is None or last >= steps - 1:  # some count from 0
            return
        stale = [step for step, loss in self._evaluations.items() if loss == told.loss]
        if stale:
            raise ProtocolError(
                f"its result, a held-out loss of {told.loss:g}, is that of step {max(stale)}, told "
                f"before, and the trial has {steps} steps: have it evaluate at step {{steps}}, and "
                "give that loss"
            )

    def _loss_step(self) -> int:
        """The step after which the loss of the result was measured."""
        h, told = self._trial.hyperparameters, self._result
        last = max(self._evaluations, default=0)
        if last >= h.steps - 1:
            return last
        if told is not None and told.tokens is not None:
            return round(told.tokens / h.batch_tokens)
        return max(self._curve, default=h.steps)

    def _require_good_end(self, child: Child) -> None:
        ended, result = child.ended, self._result
        program = " ".join(self._command.run)
        if len(program) > SHOWN:
            program = program[:SHOWN] + " ..."
        if ended is None:
            raise CommandError(f"the guard of {program!r} was killed")
        if ended.error is not None:
            raise InputError(
                f"{program!r} cannot be started on {socket.gethostname()}: "
                f"{ended.error}; give its path, or have it on the PATH of every worker"
            )
        if ended.exit:
            how = f"exited with {ended.exit}"
            if ended.exit < 0:
                names = {number.value: number.name for number in signal.Signals}
                how = f"was killed by {names.get(-ended.exit, f'signal {-ended.exit}')}"
            vain = ", so that the result it had given does not count" if result else ""
            raise CommandError(f"{program!r} {how}{vain}")
        if result is None and self.leads:
            raise ProtocolError(
                f"{program!r} ended without a result, a line such as "
                '{"loss": 3.21} on its standard output or in the file {result}'
            )
        if result is not None:
            self._counted()
            self._require_last_step(result)
            self._require_fresh(result)

    def _counted(self) -> tuple[dict[str, int], float]:
        """The parameters that were told, by convention, and exact FLOPs.

        FLOPs that were not told are those of the shape, with the matmuls' share as told.
        """
        trial, told = self._trial, self._result
        ours, names = dataclasses.asdict(params(trial.shape)), ("non_embedding", "matmul", "total")
        given = {name: getattr(told, f"params_{name}") for name in names} if told else {}
        given = {name: count for name, count in given.items() if count is not None}
        counted = ours | given
        if not counted["non_embedding"] <= counted["matmul"] <= counted["total"]:
            shown = ", ".join(f"params_{name} = {counted[name]:,}" for name in names)
            raise ProtocolError(
                f"its result means {shown}, of which each includes the one before: declare all "
                "three (what is not declared is counted from the shape)"
            )
        a_token = flops_per_token(trial.shape) + 6 * (counted["matmul"] - ours["matmul"])
        return given, (told and told.flops) or a_token * trial.tokens

    def _why_diverged(self, told: Result) -> str | None:
        guessing = math.log(self._trial.shape.vocabulary)
        if told.status == "diverged":
            return told.reason or "the program said so"
        if told.loss is None or not math.isfinite(told.loss):
            return f"the held-out loss is {told.loss}"
        if told.loss > guessing:
            return (
                f"the held-out loss {told.loss:.3f} is above {guessing:.3f} nats/token, that of "
                f"guessing among {self._trial.shape.vocabulary} symbols"
            )
        return None

    def _device(self) -> str:
        return "GPU" if self._command.gpus else f"{platform.machine()} CPU, 1 thread"


def _verify_files(command: Command) -> None:
    root = Path(command.directory)
    if not root.is_dir():
        raise InputError(
            f"there is no directory {root} on {socket.gethostname()}, in which the command runs: "
            "put it on storage that all nodes share"
        )
    for name, planned in command.files:
        try:
            found = file_hash(root / name)
        except OSError as error:
            raise InputError(
                f"the command's file {root / name} cannot be read on {socket.gethostname()}: "
                f"{error.strerror}"
            ) from error
        if found != planned:
            raise InputError(
                f"the command's file {root / name} has hash {found} on {socket.gethostname()}, but "
                f"the trial was planned with {planned}: it changed, so plan again"
            )
