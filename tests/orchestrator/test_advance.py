"""How far an attempt is, of trainings whose steps are counted here by hand."""

from dataclasses import replace

import pytest

from cluster.rank import Sign
from orchestrator.advance import Advance
from tests.orchestrator.workers import measurement, simulated
from trainers.trial import Event, Progress, Step, Trial

BATCH = 512


def _trunk(*horizons: int) -> Trial:
    """Measured after so many steps; a branch is a fifth of them."""
    trial = simulated()
    h = replace(
        trial.hyperparameters,
        schedule="wsd",
        decay_fraction=0.2,
        batch_tokens=BATCH,
        steps=horizons[-1],
        warmup_steps=1,
    )
    return replace(trial, hyperparameters=h, horizons=tuple(BATCH * n for n in horizons))


def _steps(done: range, seen: int) -> list[Event]:
    """Steps of one stretch, the first after the model has seen so many; a point at every fourth."""
    events: list[Event] = []
    for step in done:
        seen += 1
        if seen % 4 == 0:
            events.append(
                Progress(step=seen, tokens=seen * BATCH, flops=float(seen), train_loss=3.0)
            )
        events.append(Step(step))
    return events


def _fractions(advance: Advance, events: list[Event]) -> list[float]:
    found = []
    for event in events:
        advance.heard(event)
        if isinstance(event, Step):
            found.append(advance.fraction)
    return found


def test_a_training_to_one_horizon_counts_what_earlier_attempts_did() -> None:
    trial = simulated()
    steps = trial.hyperparameters.steps
    advance = Advance(trial, trial)
    assert advance.fraction == 0.0
    advance.heard(Step(steps // 2))
    assert advance.fraction == pytest.approx(0.5, abs=1 / steps)
    advance.heard(Sign())
    assert advance.fraction == pytest.approx(0.5, abs=1 / steps)
    advance.heard(Step(steps))
    assert advance.fraction == 1.0


@pytest.mark.parametrize("missed", [0, 8], ids=["all branches", "a branch after the checkpoint"])
def test_a_trunk_that_goes_on_begins_at_nothing_and_ends_at_all(missed: int) -> None:
    """To 80 from 32 on, where branches of 4 and 8 steps were left; 4 were at 16."""
    done = 32 + 4 + 8 - missed
    advance = Advance(_trunk(80), _trunk(80))
    found = _fractions(advance, _steps(range(done + 1, done + 49), 32))
    assert found[3:] == pytest.approx([n / 48 for n in range(4, 49)])
    assert found[:3] == pytest.approx([n / 48 for n in (1, 2, 3)], abs=0.03)


def test_a_trunk_with_several_horizons_left_goes_back_to_none_of_them() -> None:
    """20 steps, 4 of them a branch; then from 16 to 40, 8 of them a branch."""
    trial = _trunk(20, 40)
    advance = Advance(trial, trial)
    found = _fractions(advance, _steps(range(1, 21), 0))
    advance.heard(measurement(trial, tokens=20 * BATCH))
    found += _fractions(advance, _steps(range(21, 45), 16))
    assert found == pytest.approx([n / 44 for n in range(1, 45)])


def test_what_an_earlier_attempt_measured_counts() -> None:
    """In this run, of which the board shows the whole: 20 of 44 steps, and the rest from 16 on."""
    trial = _trunk(20, 40)
    advance = Advance(trial, trial.only([40 * BATCH]))
    found = _fractions(advance, _steps(range(21, 45), 16))
    assert found[3:] == pytest.approx([(20 + n) / 44 for n in range(4, 25)])


def test_of_a_gang_steps_are_left_out() -> None:
    """A point is heard of, and the step that is heard next is a later one."""
    advance = Advance(_trunk(80), _trunk(80))
    events = [
        event
        for event in _steps(range(45, 93), 32)
        if isinstance(event, Progress) or event.step % 3 == 0
    ]
    assert _fractions(advance, events)[-1] == pytest.approx(46 / 48, abs=0.02)
