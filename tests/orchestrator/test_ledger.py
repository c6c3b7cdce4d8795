"""The ledger: each observation once, whoever writes and whatever dies, in a directory or bucket."""

import io
import multiprocessing
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from analysis.observations import SCHEMA
from orchestrator.compaction import DIRECTORY as COMPACTED
from orchestrator.compaction import copies, write_copy
from orchestrator.ledger import FEW, Ledger
from orchestrator.planner import Plan, make_plan
from orchestrator.spec import parse_spec
from orchestrator.storage import Storage, open_storage
from trainers.registry import trainer
from trainers.trial import Measurement
from trainers.workspace import Scratch

FORK = multiprocessing.get_context("fork")


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
    return list(trainer("simulated").train(trial, Scratch(Path("nowhere"))))[-1]


def _fill(ledger: Ledger, plan: Plan, seeds: range) -> None:
    """Rows of one trial under many seeds: their losses are their seeds."""
    measurement = _measure(plan)
    for seed in seeds:
        ledger.write(replace(plan.trials[0], seed=seed), replace(measurement, loss=float(seed)))


def _seeds(table: pa.Table) -> list[int]:
    assert table["loss"].to_pylist() == table["seed"].to_pylist()
    assert table["trial"].to_pylist() == sorted(table["trial"].to_pylist())
    return sorted(table["seed"].to_pylist())


def _race(uri: str, plan: Plan, results) -> None:
    results.put(Ledger(open_storage(uri)).write(plan.trials[0], _measure(plan)))


def _write_for_ever(directory: Path, plan: Plan) -> None:
    while True:
        for index in range(4):
            Ledger(open_storage(directory)).write(plan.trials[index], _measure(plan, index))
            for path in (directory / "ledger").glob("*.parquet"):
                path.unlink()


def test_a_row_has_every_column_and_its_units(storage: Storage, plan: Plan) -> None:
    ledger, trial = Ledger(storage), plan.trials[1]
    measurement = _measure(plan, 1)
    assert ledger.write(trial, measurement)
    assert storage.names("ledger") == [f"{trial.key}-{trial.tokens}.parquet"]
    written = pq.read_schema(io.BytesIO(storage.read(f"ledger/{storage.names('ledger')[0]}")))
    assert written.names == SCHEMA.names
    units = {name: written.field(name).metadata[b"unit"] for name in SCHEMA.names}
    assert units == {field.name: field.metadata[b"unit"] for field in SCHEMA}
    (row,) = ledger.read().to_pylist()
    assert ledger.find((trial.key, trial.tokens)) == row
    assert row["loss"] == measurement.loss
    assert row["params_non_embedding"] == 24 * trial.shape.width**2
    assert row["flops_6nd"] == 6 * row["params_non_embedding"] * row["tokens"]
    assert row["flops_exact"] == pytest.approx(1e10, rel=0.03)
    assert row["curve"][-1]["heldout_loss"] == measurement.loss
    assert row["finished_at"].tzinfo is not None


def test_the_first_write_stays(storage: Storage, plan: Plan) -> None:
    ledger, measurement = Ledger(storage), _measure(plan)
    assert ledger.write(plan.trials[0], measurement)
    assert not ledger.write(plan.trials[0], replace(measurement, loss=9.0))
    assert ledger.read()["loss"].to_pylist() == [measurement.loss]
    assert ledger.find((plan.trials[1].key, 1)) is None


def test_only_what_is_asked_for_is_read(storage: Storage, plan: Plan) -> None:
    ledger = Ledger(storage)
    _fill(ledger, plan, range(4))
    some = {name for name in ledger.ids() if name[0] != plan.trials[0].key}
    table = ledger.read(some, ("seed", "status"))
    assert table.column_names == ["seed", "status"]
    assert sorted(table["seed"].to_pylist()) == [1, 2, 3]
    assert ledger.read(set(), ("seed",)).to_pydict() == {"seed": []}


def test_of_racing_processes_one_wins(storage: Storage, plan: Plan) -> None:
    results = FORK.Queue()
    racers = [FORK.Process(target=_race, args=(storage.uri, plan, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(results.get() for _ in racers) == [False] * 7 + [True]
    assert Ledger(storage).read().num_rows == 1
    if storage.local:
        assert len(list((storage.local / "ledger").iterdir())) == 1


def test_a_killed_writer_leaves_no_half_row(tmp_path: Path, plan: Plan) -> None:
    ledger = Ledger(open_storage(tmp_path))
    for delay in (0.05, 0.1, 0.15, 0.2):
        writer = FORK.Process(target=_write_for_ever, args=(tmp_path, plan))
        writer.start()
        writer.join(delay)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert ledger.read().num_rows == len(ledger.ids())


def test_a_file_cut_short_is_named(storage: Storage, plan: Plan) -> None:
    ledger = Ledger(storage)
    ledger.write(plan.trials[0], _measure(plan))
    (name,) = storage.names("ledger")
    storage.replace(f"ledger/{name}", storage.read(f"ledger/{name}")[:-100])
    with pytest.raises(InputError, match=rf"{name} is not a readable Parquet file"):
        ledger.read()


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_a_foreign_schema_is_named(storage: Storage) -> None:
    storage.create("ledger/abc-12.parquet", _parquet(pa.table({"loss": [1.0]})))
    with pytest.raises(
        InputError, match="is not an isoflop observation: it lacks the columns trial"
    ):
        Ledger(storage).read()


def test_a_foreign_file_name_is_named(storage: Storage) -> None:
    storage.create("ledger/notes.parquet", _parquet(pa.table({"loss": [1.0]})))
    with pytest.raises(InputError, match="no file of a ledger"):
        Ledger(storage).ids()


@pytest.fixture
def compacted(storage: Storage, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger of 12 rows in a copy and 3 that came later."""
    monkeypatch.setattr("orchestrator.ledger.FEW", 5)
    ledger = Ledger(storage)
    _fill(ledger, plan, range(12))
    ledger.compact()
    _fill(ledger, plan, range(12, 15))
    return ledger


def test_a_compacted_ledger_reads_as_it_did(compacted: Ledger) -> None:
    single = Ledger(compacted.storage)
    rows = [single.find(name) for name in sorted(single.ids())]
    assert compacted.read().to_pylist() == rows
    assert compacted.read().schema.equals(SCHEMA, check_metadata=True)
    assert len(rows) == 15


def test_a_copy_spares_reading_what_it_has(compacted: Ledger, monkeypatch) -> None:
    read, asked = compacted.storage.read_many, []

    def listening(names):
        names = list(names)
        asked.extend(names)
        return read(names)

    monkeypatch.setattr(compacted.storage, "read_many", listening)
    assert _seeds(compacted.read()) == list(range(15))
    assert len([name for name in asked if name.startswith("ledger/")]) == 3


def test_compacting_leaves_the_rows_and_removes_older_copies(compacted: Ledger) -> None:
    storage = compacted.storage
    before = {name: storage.read(f"ledger/{name}") for name in storage.names("ledger")}
    name = compacted.compact()
    assert copies(storage) == [name]
    assert {name: storage.read(f"ledger/{name}") for name in storage.names("ledger")} == before
    assert compacted.compact() == name
    assert copies(storage) == [name]
    assert _seeds(compacted.read()) == list(range(15))


def test_rows_in_several_copies_are_read_once(compacted: Ledger) -> None:
    """As after a crash before the older copy was removed, or beside another compactor."""
    write_copy(compacted.storage, compacted.read(), older=())
    assert len(copies(compacted.storage)) == 2
    assert _seeds(compacted.read()) == list(range(15))
    compacted.compact()
    assert len(copies(compacted.storage)) == 1


def test_a_row_that_was_taken_out_of_the_ledger_is_not_read_from_a_copy(compacted: Ledger) -> None:
    name = next(name for name in compacted.ids() if compacted.find(name)["seed"] == 7)
    compacted.storage.remove(f"ledger/{name[0]}-{name[1]}.parquet")
    assert _seeds(compacted.read()) == [seed for seed in range(15) if seed != 7]


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_copy_is_ignored_and_said_and_replaced(compacted: Ledger, damage: str) -> None:
    name = compacted.compact()
    path = f"{COMPACTED}/{name}"
    data = compacted.storage.read(path)
    cut = data[:-100] if damage == "cut" else _parquet(pa.table({"loss": [1.0]}))
    compacted.storage.replace(path, cut)
    with pytest.warns(UserWarning, match=f"copy of the ledger is ignored: .*{name}"):
        assert _seeds(compacted.read()) == list(range(15))
    with pytest.warns(UserWarning, match="is ignored"):
        assert compacted.compact() == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _seeds(compacted.read()) == list(range(15))


def test_a_copy_that_vanishes_under_a_reader_is_done_without(compacted: Ledger, monkeypatch):
    storage = compacted.storage
    listed = storage.names

    def listed_and_gone(directory: str, prefix: str = "") -> list[str]:
        names = listed(directory, prefix)
        if directory == COMPACTED:
            for name in names:
                storage.remove(f"{COMPACTED}/{name}")
        return names

    monkeypatch.setattr(storage, "names", listed_and_gone)
    assert _seeds(compacted.read()) == list(range(15))


def _compact_for_ever(directory: Path, failed) -> None:
    ledger = Ledger(open_storage(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            try:
                ledger.compact()
            except Exception as error:
                failed.put(repr(error))


def test_compactors_that_race_and_die_lose_and_double_nothing(tmp_path: Path, plan: Plan) -> None:
    ledger, failed = Ledger(open_storage(tmp_path)), FORK.Queue()
    done = FEW + 10
    _fill(ledger, plan, range(done))
    for _ in range(4):
        racers = [FORK.Process(target=_compact_for_ever, args=(tmp_path, failed)) for _ in "12"]
        for racer in racers:
            racer.start()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            _fill(ledger, plan, range(done, done + 1))
            done += 1
            assert _seeds(ledger.read()) == list(range(done))
        for racer in racers:
            racer.kill()
            racer.join()
    assert failed.empty()
    assert _seeds(ledger.read()) == list(range(done))
    ledger.compact()
    assert len(copies(ledger.storage)) == 1


def test_compaction_waits_until_it_is_worthwhile(tmp_path: Path, plan: Plan) -> None:
    ledger = Ledger(open_storage(tmp_path))
    done = 0
    for rows, expected in ((100, False), (101, True), (201, False), (202, True)):
        _fill(ledger, plan, range(done, rows))
        done = rows
        assert ledger.compact_if_worthwhile() == expected
    assert len(copies(ledger.storage)) == 1
