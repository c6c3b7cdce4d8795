"""The benchmark of one GPU, at its toy sizes on a CPU: stages run, and failures are reported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import gpu_stages
from benchmarks.gpu import GANG, STAGES, Stage, run, table
from trainers.trial import Hyperparameters

pytestmark = pytest.mark.slow


def test_every_stage_passes_at_toy_size() -> None:
    """One process a stage, one JSON line a stage, and nothing wrong on a machine without a GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=470, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["stage"] for report in reports] == [s.name for s in (*STAGES, GANG)]
    assert {report["stage"]: report["bad"] for report in reports if report["bad"]} == {}
    assert done.returncode == 0, done.stderr
    by_stage = {report["stage"]: report for report in reports}
    losses = by_stage["trial"]["losses"]
    assert losses["first"] == losses["second"] == losses["resumed"]
    gang = by_stage["gang"]
    assert gang["gang"]["loss"] == pytest.approx(gang["alone"]["loss"], abs=1e-5)


def test_a_stage_that_takes_too_long_is_ended_and_named() -> None:
    (report,) = run([Stage("trial", 0.2)])
    assert report["bad"] == ["not done within 0 s"]
    assert report["seconds"] < 60


def test_a_stage_that_fails_is_reported_with_its_error() -> None:
    (report,) = run([Stage("no such stage", 60)])
    assert report["bad"] == ["the process ended with exit code 2"]
    assert "no such stage" in report["error"]


def test_what_no_time_is_left_for_is_wrong() -> None:
    (report,) = run([Stage("trial", 60)], limit=1.0)
    assert "not started" in report["bad"][0]


def test_numerics_notice_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that trains at twice the rate is as far off as a wrong kernel would be."""
    plain = gpu_stages._plain_losses

    def faster(shape, h: Hyperparameters) -> list[float]:
        rates = {name: 2 * getattr(h, name) for name in ("matrix_rate", "embedding_rate")}
        return plain(shape, replace(h, **rates))

    monkeypatch.setattr(gpu_stages, "_plain_losses", faster)
    assert len(gpu_stages.numerics(1)["bad"]) >= 5


def test_the_table_shows_what_is_wrong() -> None:
    report = {"stage": "trial", "seconds": 3.0, "bad": ["trained on a CPU"], "MFU": 0.4321}
    shown = table([report])
    assert shown.row_count == 1
    assert list(shown.columns[3].cells) == ["trained on a CPU"]
    assert list(shown.columns[2].cells) == ["MFU 0.4321"]
