"""Trunks: their branches are the runs that they stand for, at a part of the cost."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from analysis.errors import InputError
from trainers.flops import flops_per_token, trial_flops
from trainers.pretrain import Pretrain
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import Scratch

BATCH = 512
pytestmark = pytest.mark.slow


@pytest.fixture
def trunk(make_trial):
    """A small trunk with the given horizons, in steps; a point of its curve each step by default.

    `reference` is what sets batch and rates, and how far apart points are.
    """

    def make(*steps: int, reference: int = 40) -> Trial:
        trial = make_trial(16, 3e9)
        changed = dataclasses.replace(
            trial.hyperparameters,
            schedule="wsd",
            decay_fraction=0.2,
            final_fraction=0.0,
            batch_tokens=BATCH,
            steps=reference,
            warmup_steps=5,
        )
        return dataclasses.replace(
            trial, hyperparameters=changed, horizons=tuple(BATCH * n for n in steps)
        )

    return make


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Trial], list[Measurement]]:
    """Trains from scratch: horizons are no part of the key, so each time in another directory."""

    def train(trial: Trial) -> list[Measurement]:
        measured = _measured(trial, Scratch(tmp_path_factory.mktemp("fresh")))
        assert {row.resumed_from for row in measured} == {0}
        return measured

    return train


def _measured(trial: Trial, workspace: Scratch) -> list[Measurement]:
    return _measurements(Pretrain().train(trial, workspace))


def _measurements(events: Iterable[Event]) -> list[Measurement]:
    return [event for event in events if isinstance(event, Measurement)]


def _burnt(trial: Trial, workspace: Scratch, until: int = 0) -> tuple[int, list[Measurement]]:
    """Steps that an attempt does, and what it measures; it ends with so many measurements."""
    steps, found = 0, []
    for event in Pretrain().train(trial, workspace):
        steps += isinstance(event, Step)
        if isinstance(event, Measurement):
            found.append(event)
            workspace.rows.add(event.tokens)
            if len(found) == until:
                break
    return steps, found


def _told(measured: Measurement) -> tuple:
    curve = [(p.step, p.train_loss, p.heldout_loss) for p in measured.curve]
    return measured.tokens, measured.status, measured.loss, measured.flops_spent, curve


def test_a_branch_is_the_run_to_that_horizon_alone_to_the_bit(trunk, fresh) -> None:
    """With its whole curve, though branches leave the trunk between two points of its own."""
    make = partial(trunk, reference=70)
    together = fresh(make(21, 40, 80))
    assert make(21).decay_start(21 * BATCH) == 17
    assert 17 not in [point.step for point in together[-1].curve]
    for measured in together:
        (alone,) = fresh(make(measured.tokens // BATCH))
        assert (alone.loss, alone.loss_stderr) == (measured.loss, measured.loss_stderr)
        assert alone.curve == measured.curve
    losses = [measured.loss for measured in together]
    assert losses == sorted(losses, reverse=True)


def test_a_trunk_is_looked_at_for_as_long_as_it_goes_on(trunk, tmp_path: Path) -> None:
    """As often as a run of its reference horizon; the rest is the decay of its one branch."""
    trial = trunk(100, reference=20)
    *events, measured = Pretrain().train(trial, Scratch(tmp_path))
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == [point.step for point in measured.curve]
    assert steps == [*range(1, 81), 82, 85, 88, 90, 92, 95, 98, 100]
    heldout = [point.step for point in measured.curve if point.heldout_loss is not None]
    assert heldout == [*range(4, 81, 4), 85, 90, 95, 100]


def test_rows_add_up_to_what_was_burnt_and_horizons_of_1_2_4_8_cost_less_than_two_thirds(
    trunk, fresh
) -> None:
    trial = trunk(20, 40, 80, 160)
    measured = fresh(trial)
    per_step = BATCH * flops_per_token(trial.shape)
    # 4, 8, 16 and 32 steps of decay, and the trunk up to where the last begins.
    assert trial.total_steps == 128 + 4 + 8 + 16 + 32
    assert sum(m.flops_spent for m in measured) == pytest.approx(trial_flops(trial), rel=1e-12)
    assert trial_flops(trial) == pytest.approx(188 * per_step, rel=1e-12)
    separately = sum(trial_flops(trunk(n)) for n in (20, 40, 80, 160))
    assert trial_flops(trial) / separately == pytest.approx(9.4 / 15, rel=0.01)
    assert sum(m.steps for m in measured) == trial.total_steps


@pytest.mark.parametrize("stop", [7, 19, 23, 40])
def test_an_interrupted_trunk_ends_as_the_whole_one(
    trunk, fresh, tmp_path: Path, stop: int
) -> None:
    """On the trunk, within the first branch, on the trunk after it, within the second branch."""
    trial, whole = trunk(20, 40), fresh(trunk(20, 40))
    workspace = Scratch(tmp_path, every_steps=3)
    found = []
    for event in Pretrain().train(trial, workspace):
        if isinstance(event, Measurement):
            found.append(event)
        if isinstance(event, Step) and event.step == stop:
            break
    left = tuple(h for h in trial.horizons if h not in {m.tokens for m in found})
    if left:
        again = _measured(dataclasses.replace(trial, horizons=left), workspace)
        assert again[0].resumed_from > 0
        found += again
    assert [_told(m) for m in found] == [_told(m) for m in whole]


@pytest.mark.parametrize("every", [13, 18], ids=["on the trunk", "within the branch"])
def test_rows_add_up_where_one_is_told_after_the_last_checkpoint(
    trunk, tmp_path: Path, every: int
) -> None:
    """It has paid for the steps before the checkpoint: the next row must not pay again."""
    trial, workspace = trunk(20, 40), Scratch(tmp_path, every_steps=every)
    before, (first,) = _burnt(trial, workspace, until=1)
    clock = time.perf_counter()
    after, (second,) = _burnt(trial.only({40 * BATCH}), Scratch(tmp_path, rows=workspace.rows))
    assert second.seconds < time.perf_counter() - clock
    assert second.resumed_from == every
    spent = [row.flops_spent for row in (first, second)]
    assert sum(spent) == pytest.approx((before + after) * BATCH * flops_per_token(trial.shape))
    assert (first.steps, second.steps) == (before, after)


def test_steps_to_a_horizon_that_was_never_measured_are_the_next_row_s(
    trunk, tmp_path: Path
) -> None:
    """Somebody has taken it out of the sweep."""
    for event in Pretrain().train(trunk(20, 40), Scratch(tmp_path, every_steps=18)):
        if event == Step(18):
            break
    after, (row,) = _burnt(trunk(40), Scratch(tmp_path))
    assert row.resumed_from == 18
    assert row.flops_spent == (18 + after) * BATCH * flops_per_token(trunk(40).shape)


def test_a_trunk_is_extended_from_where_its_last_branch_left_it(
    trunk, fresh, tmp_path: Path
) -> None:
    workspace = Scratch(tmp_path)
    _, first = _burnt(trunk(20), workspace)
    (further,) = _measured(trunk(80), workspace)
    assert (first[0].resumed_from, further.resumed_from) == (0, 16)
    (whole,) = [m for m in fresh(trunk(20, 80)) if m.tokens == 80 * BATCH]
    assert (further.loss, further.flops_spent) == (whole.loss, whole.flops_spent)


def test_an_earlier_horizon_is_trained_anew(trunk, fresh, tmp_path: Path) -> None:
    """Nothing of a trunk that has gone by it is left but where it is now."""
    workspace = Scratch(tmp_path)
    _measured(trunk(80), workspace)
    (earlier,) = _measured(trunk(20), workspace)
    assert earlier.resumed_from == 0
    assert earlier.loss == fresh(trunk(20))[0].loss


def test_horizons_are_no_part_of_the_key(trunk) -> None:
    assert trunk(20).key == trunk(20, 40).key
    assert Trial.from_dict(trunk(20, 40).to_dict()) == trunk(20, 40)


@pytest.mark.parametrize(
    ("horizons", "message"),
    [
        ((40 * BATCH, 20 * BATCH), "horizon 10,240 follows 20,480: they must ascend"),
        ((20 * BATCH + 1,), "no multiple of the batch of 512 tokens"),
        ((5 * BATCH,), "decay would begin at step 4, within the 5 steps of warm-up"),
        ((7 * BATCH,), "horizon 3,584 is 7 steps, and its decay would be one of them"),
    ],
)
def test_impossible_horizons_are_refused(trunk, horizons: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(trunk(20), horizons=horizons)


def test_a_cosine_has_no_horizons(make_trial) -> None:
    with pytest.raises(InputError, match="horizons are for the schedule wsd"):
        dataclasses.replace(make_trial(16, 3e9), horizons=(BATCH,))
