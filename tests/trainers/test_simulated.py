"""The simulated trainer samples the law that it is told."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from trainers.flops import params
from trainers.simulated import Simulated, SimulatedSettings
from trainers.trial import Trial


def _simulated(trial: Trial, seed: int = 0, **settings: float) -> Trial:
    values = dataclasses.asdict(SimulatedSettings(**settings))
    return dataclasses.replace(trial, seed=seed, settings=tuple(sorted(values.items())))


def _loss(trial: Trial) -> float:
    return list(Simulated().train(trial, Path()))[-1].loss


def test_without_noise_it_is_the_law(make_trial) -> None:
    trial = _simulated(make_trial(24, 4e10), noise=0.0, gamma=0.7)
    n, d = params(trial.shape).non_embedding, trial.tokens
    expected = 1.8172 + (482.01 * n**-0.3478 + 2085.43 * d**-0.3658) ** 0.7
    assert _loss(trial) == pytest.approx(expected, rel=1e-12)


def test_its_noise_has_the_asked_size_and_is_fixed_by_the_key(make_trial) -> None:
    trial = make_trial(24, 4e10)
    clean = _loss(_simulated(trial, noise=0.0))
    draws = np.log([_loss(_simulated(trial, seed, noise=0.01)) / clean for seed in range(400)])
    assert draws.std() == pytest.approx(0.01, rel=0.15)
    assert abs(draws.mean()) < 0.002
    assert _loss(_simulated(trial, 7, noise=0.01)) == _loss(_simulated(trial, 7, noise=0.01))


def test_it_diverges_and_fails_on_request(make_trial) -> None:
    trial = make_trial(24, 4e10)
    measured = list(Simulated().train(_simulated(trial, diverge=1.0), Path()))[-1]
    assert (measured.status, measured.loss) == ("diverged", None)
    with pytest.raises(RuntimeError, match="simulated failure"):
        _loss(_simulated(trial, fail=1.0))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        SimulatedSettings(noise=-1)
