"""Runs that did not finish are told by a column, and counted by what it says."""

import pyarrow as pa
import pytest

from analysis.errors import InputError
from analysis.statuses import finished


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("status", "FINISHED", "FAILED"),  # MLflow
        ("State", "finished", "crashed"),  # W&B
        ("state", "COMPLETED", "NODE_FAIL"),  # SLURM
        ("trial_status", "TERMINATED", "ERROR"),  # Ray Tune
        ("state", "COMPLETE", "PRUNED"),  # Optuna
        ("finished", True, False),
        ("diverged", False, True),
        ("finished", 1, 0),
        ("crashed", "no", "yes"),
        ("summary.state", "COMPLETED", "CANCELLED by 1000"),
        ("state", "TrialState.COMPLETE", "TrialState.PRUNED"),
    ],
)
def test_runs_that_did_not_finish_are_left_out_and_counted(name, good, bad) -> None:
    found = finished(pa.table({name: [good, bad, good, bad, None]}), ())
    assert found.kept.tolist() == [True, False, True, False, True]
    assert found.excluded == {
        f"unfinished: {name} is {str(bad).lower() if isinstance(bad, bool) else bad}": 2
    }
    assert found.columns == {name}


def test_a_state_that_is_none_means_nothing() -> None:
    found = finished(pa.table({"state": ["Ohio", "Utah"], "status": [1, 2]}), ())
    assert found.kept.all()
    assert not found.columns
    assert found.notes == ()


def test_a_value_that_is_not_understood_stays_and_is_said() -> None:
    found = finished(pa.table({"status": ["done", "archived", "failed"]}), ())
    assert found.kept.tolist() == [True, True, False]
    (note,) = found.notes
    assert "'archived'" in note


def test_what_somebody_selected_by_is_not_asked() -> None:
    table = pa.table({"status": ["FAILED", "RUNNING"]})
    assert finished(table, {"status"}).kept.all()
    with pytest.raises(
        InputError, match=r"no run of 2 finished .*status is FAILED.*--where status="
    ):
        finished(table, ())
