"""The ledger: each observation once, whoever writes and whatever dies."""

import json
import multiprocessing
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from analysis.observations import SCHEMA
from orchestrator.ledger import Ledger
from orchestrator.planner import Plan, make_plan
from orchestrator.spec import parse_spec
from trainers.registry import trainer
from trainers.trial import Measurement


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(
        parse_spec(
            {"name": "x", "trainer": "simulated", "budgets": [1e10], "sizes": 4},
            source=Path("x.toml"),
        )
    )


def _measure(plan: Plan, index: int = 0) -> Measurement:
    trial = plan.trials[index]
    return list(trainer("simulated").train(trial, Path()))[-1]


def _race(directory: Path, plan: Plan, results) -> None:
    measurement = _measure(plan)
    results.put(Ledger(directory).write(plan.trials[0], measurement))


def _write_for_ever(directory: Path, plan: Plan) -> None:
    while True:
        for index in range(4):
            Ledger(directory).write(plan.trials[index], _measure(plan, index))
            for path in (directory / "ledger").glob("*.parquet"):
                path.unlink()


def test_a_row_has_every_column_and_its_units(tmp_path: Path, plan: Plan) -> None:
    ledger, trial = Ledger(tmp_path), plan.trials[1]
    measurement = _measure(plan, 1)
    assert ledger.write(trial, measurement)
    (path,) = ledger.files()
    assert path.name == f"{trial.key}-{trial.tokens}.parquet"
    written = pq.read_schema(path)
    assert written.names == SCHEMA.names
    units = {name: written.field(name).metadata[b"unit"] for name in SCHEMA.names}
    assert units == {field.name: field.metadata[b"unit"] for field in SCHEMA}
    (row,) = ledger.read().to_pylist()
    assert row["loss"] == measurement.loss
    assert row["params_non_embedding"] == 24 * trial.shape.width**2
    assert row["flops_6nd"] == 6 * row["params_non_embedding"] * row["tokens"]
    assert row["flops_exact"] == pytest.approx(1e10, rel=0.03)
    assert row["curve"][-1]["heldout_loss"] == measurement.loss
    assert row["finished_at"].tzinfo is not None


def test_the_first_write_stays(tmp_path: Path, plan: Plan) -> None:
    ledger, measurement = Ledger(tmp_path), _measure(plan)
    assert ledger.write(plan.trials[0], measurement)
    before = ledger.files()[0].read_bytes()
    assert not ledger.write(plan.trials[0], measurement)
    assert ledger.files()[0].read_bytes() == before


def test_of_racing_processes_one_wins(tmp_path: Path, plan: Plan) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, plan, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(results.get() for _ in racers) == [False] * 7 + [True]
    assert len(Ledger(tmp_path).files()) == 1
    assert list((tmp_path / "ledger").iterdir()) == Ledger(tmp_path).files()


def test_a_killed_writer_leaves_no_half_row(tmp_path: Path, plan: Plan) -> None:
    context = multiprocessing.get_context("fork")
    for delay in (0.05, 0.1, 0.15, 0.2):
        writer = context.Process(target=_write_for_ever, args=(tmp_path, plan))
        writer.start()
        writer.join(delay)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert Ledger(tmp_path).read().num_rows == len(Ledger(tmp_path).files())


def test_a_file_cut_short_is_named(tmp_path: Path, plan: Plan) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(plan.trials[0], _measure(plan))
    (path,) = ledger.files()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{path.name} is not a readable Parquet file"):
        ledger.read()


def test_a_foreign_schema_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.directory.mkdir()
    pq.write_table(pa.table({"loss": [1.0]}), ledger.directory / "abc-12.parquet")
    with pytest.raises(
        InputError, match="is not an isoflop observation: it lacks the columns trial"
    ):
        ledger.read()


def test_a_foreign_file_name_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.directory.mkdir()
    pq.write_table(pa.table({"loss": [1.0]}), ledger.directory / "notes.parquet")
    with pytest.raises(InputError, match="no file of a ledger"):
        ledger.ids()


def test_failures_keep_their_traceback(tmp_path: Path, plan: Plan) -> None:
    ledger = Ledger(tmp_path)
    ledger.record_failure(plan.trials[0], "RuntimeError: x", "Traceback ...")
    (record,) = ledger.failures()
    assert record["trial"] == plan.trials[0].key
    assert record["error"] == "RuntimeError: x"
    assert json.loads(next(ledger.attempts.iterdir()).read_text()) == record
