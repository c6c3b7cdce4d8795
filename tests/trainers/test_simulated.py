"""The simulated trainer samples the law that it is told, and can be stopped, resumed and stuck."""

import dataclasses
import itertools
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers import simulated
from trainers.flops import params
from trainers.simulated import CONDUCT, Simulated, SimulatedSettings
from trainers.trial import Measurement, Progress, Step, Trial
from trainers.workspace import Scratch

NOWHERE = Scratch(Path("nowhere"))


def _simulated(trial: Trial, seed: int = 0, **told: float) -> Trial:
    values = dataclasses.asdict(SimulatedSettings(**told))
    return dataclasses.replace(trial, seed=seed, settings=tuple(sorted(values.items())))


def _measured(trial: Trial, workspace: Scratch = NOWHERE) -> Measurement:
    *_, last = Simulated().train(trial, workspace)
    assert isinstance(last, Measurement)
    return last


def test_without_noise_it_is_the_law(make_trial) -> None:
    trial = _simulated(make_trial(24, 4e10), noise=0.0, gamma=0.7)
    n, d = params(trial.shape).non_embedding, trial.tokens
    expected = 1.8172 + (482.01 * n**-0.3478 + 2085.43 * d**-0.3658) ** 0.7
    assert _measured(trial).loss == pytest.approx(expected, rel=1e-12)


def test_its_noise_has_the_asked_size_and_is_fixed_by_the_key(make_trial) -> None:
    trial = make_trial(24, 4e10)
    clean = _measured(_simulated(trial, noise=0.0)).loss
    draws = np.log(
        [_measured(_simulated(trial, seed, noise=0.01)).loss / clean for seed in range(400)]
    )
    assert draws.std() == pytest.approx(0.01, rel=0.15)
    assert abs(draws.mean()) < 0.002
    noisy = _simulated(trial, 7, noise=0.01)
    assert _measured(noisy).loss == _measured(noisy).loss


def test_it_diverges_and_fails_on_request(make_trial) -> None:
    trial = make_trial(24, 4e10)
    measured = _measured(_simulated(trial, diverge=1.0))
    assert (measured.status, measured.loss) == ("diverged", None)
    with pytest.raises(RuntimeError, match="simulated failure"):
        _measured(_simulated(trial, fail=1.0))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"noise": -1}, "has noise = -1, but it should be finite and at least 0"),
        ({"gpus": math.nan}, "has gpus = nan"),
        ({"gamma": 0}, "has gamma = 0, but it should be finite and above 0"),
        ({"hang": 2}, "has hang = 2, a chance, which is between 0 and 1"),
        ({"points": 0}, "has points = 0, but it should be at least 1"),
    ],
)
def test_impossible_settings_are_refused(told: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedSettings(**told)


def test_what_it_is_told_is_either_its_truth_or_its_conduct() -> None:
    """A new setting in neither would rename the trainer of every simulated row."""
    names = {field.name for field in dataclasses.fields(SimulatedSettings)}
    assert names - CONDUCT == {"E", "A", "B", "alpha", "beta", "gamma", "noise"}
    assert names >= CONDUCT


@given(stops=st.lists(st.integers(1, 40), max_size=6), every=st.integers(1, 400))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interruptions_change_nothing(
    make_trial, tmp_path_factory: pytest.TempPathFactory, stops: list[int], every: int
) -> None:
    trial = _simulated(make_trial(24, 4e10), points=7)
    whole = _measured(trial)
    workspace = Scratch(tmp_path_factory.mktemp("trial"), every_steps=every)
    done = 0
    for stop in stops:
        taken = list(itertools.islice(Simulated().train(trial, workspace), stop))
        done = max([done, *(e.step for e in taken if isinstance(e, Step | Progress))])
    measured = _measured(trial, workspace)
    assert (measured.loss, measured.curve) == (whole.loss, whole.curve)
    assert measured.resumed_from <= done
    assert measured.resumed_from + measured.steps == trial.hyperparameters.steps
    assert whole.steps == trial.hyperparameters.steps


def test_the_curve_has_the_points_that_are_asked_for_on_the_law(make_trial) -> None:
    trial = _simulated(make_trial(24, 4e10), points=50)
    events = list(Simulated().train(trial, NOWHERE))
    curve = [event for event in events if isinstance(event, Progress)]
    assert len(curve) == 50
    assert curve[-1].tokens == trial.tokens
    assert [dataclasses.replace(p, heldout_loss=None) for p in events[-1].curve] == curve
    for point in curve:
        law = SimulatedSettings().loss(params(trial.shape).non_embedding, point.tokens)
        assert point.train_loss == pytest.approx(law)


class Clock:
    """Time that passes only while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(simulated, "time", made)
    return made


def test_a_slow_trial_can_be_stopped_within_50_ms(make_trial, clock: Clock) -> None:
    trial = _simulated(make_trial(24, 4e10), seconds=2.0, points=5)
    times = [0.0]
    for event in Simulated().train(trial, NOWHERE):
        if isinstance(event, Step):
            times.append(clock.now)
            assert clock.now == pytest.approx(
                2.0 * event.step / trial.hyperparameters.steps, abs=0.01
            )
    assert max(np.diff(times)) < 0.05
    assert clock.now == pytest.approx(2.0)


def test_it_takes_its_time_whatever_its_caller_does_meanwhile(make_trial, clock: Clock) -> None:
    trial = _simulated(make_trial(24, 4e10), seconds=0.4)
    for event in Simulated().train(trial, NOWHERE):
        if isinstance(event, Progress):
            clock.sleep(0.001)
    assert clock.now == pytest.approx(0.4, abs=0.002)


def test_a_trial_hangs_once_and_then_goes_on_from_its_checkpoint(
    make_trial, tmp_path: Path
) -> None:
    trial = _simulated(make_trial(24, 4e10), hang=1.0)
    workspace = Scratch(tmp_path)
    stuck = threading.Thread(target=_measured, args=(trial, workspace), daemon=True)
    stuck.start()
    stuck.join(1.0)
    assert stuck.is_alive()
    measured = _measured(trial, workspace)
    assert measured.resumed_from == trial.hyperparameters.steps // 2


def test_a_damaged_checkpoint_is_set_aside(make_trial, tmp_path: Path) -> None:
    trial = _simulated(make_trial(24, 4e10))
    workspace = Scratch(tmp_path, every_steps=1)
    list(itertools.islice(Simulated().train(trial, workspace), 9))
    next(workspace.checkpoints()).write_text('{"key":')
    with pytest.warns(UserWarning, match="no JSON"):
        assert _measured(trial, workspace).loss == _measured(trial).loss


def test_it_needs_nothing_heavy() -> None:
    """A worker of simulated trials starts ten times as fast as one that imports torch."""
    heavy = "{'torch', 'scipy', 'ray', 'mlflow', 'pyarrow', 'matplotlib'}"
    code = f"import sys, trainers.simulated; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
