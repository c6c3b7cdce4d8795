"""The ledger: each observation once, whoever writes and whatever dies, in a directory or bucket."""

import io
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from analysis.observations import SCHEMA, observation_ids
from orchestrator.compaction import DIRECTORY as COMPACTED
from orchestrator.compaction import CopyWarning, copies, write_copy
from orchestrator.ledger import FEW, Ledger, file_name, read_row
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project
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
        Ledger(storage).read()
    assert Ledger(storage).ids() == set()


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
    read = []

    def listening(place, data, name, columns=None):
        read.append(place)
        return read_row(place, data, name, columns)

    monkeypatch.setattr("orchestrator.ledger.read_row", listening)
    assert _seeds(compacted.read()) == list(range(15))
    assert len(read) == 3


def test_in_a_bucket_a_copy_spares_fetching_what_it_has(
    request: pytest.FixtureRequest, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.ledger.FEW", 2)
    ledger = Ledger(open_storage(f"{request.getfixturevalue('bucket')}/p"))
    _fill(ledger, plan, range(4))
    ledger.compact()
    fetched, read = [], ledger.storage.read_many
    monkeypatch.setattr(
        ledger.storage, "read_many", lambda names: fetched.extend(names := [*names]) or read(names)
    )
    assert _seeds(ledger.read()) == list(range(4))
    assert [name.partition("/")[0] for name in fetched] == ["compacted"]


# What somebody can do who may write to a project.


def _forged(table: pa.Table, loss: float) -> pa.Table:
    at = table.column_names.index("loss")
    return table.set_column(at, table.field(at), pa.array([loss] * table.num_rows, pa.float64()))


def _read_file(ledger: Ledger, name: tuple[str, int]) -> pa.Table:
    return pq.read_table(io.BytesIO(ledger.storage.read(file_name(name))))


def test_a_file_that_claims_another_rows_name_wins_nothing(storage: Storage, plan: Plan) -> None:
    ledger = Ledger(storage)
    _fill(ledger, plan, range(3))
    before = ledger.read().to_pylist()
    victim, *_ = sorted(ledger.ids())
    forged = _forged(_read_file(ledger, victim), 0.01)
    storage.create("ledger/zzzzzzzzzzzzzzzz-1.parquet", _parquet(forged))
    storage.create("ledger/0000000000000000-1.parquet", _parquet(forged))
    rows = ledger.survey()
    assert rows.table.to_pylist() == before
    assert [odd.file for odd in rows.left_out] == [
        "ledger/0000000000000000-1.parquet",
        "ledger/zzzzzzzzzzzzzzzz-1.parquet",
    ]
    assert f"has the row of {victim[0]} at {victim[1]} tokens" in rows.left_out[0].reason
    with pytest.raises(InputError, match="not the one row that its name says"):
        ledger.read()
    with pytest.raises(InputError, match="not the one row that its name says"):
        ledger.find(("zzzzzzzzzzzzzzzz", 1))


def test_a_file_with_several_rows_is_none(storage: Storage, plan: Plan) -> None:
    ledger = Ledger(storage)
    _fill(ledger, plan, range(3))
    one, *others = sorted(ledger.ids())
    several = pa.concat_tables([_read_file(ledger, name) for name in (one, *others)])
    storage.replace(file_name(one), _parquet(several))
    rows = ledger.survey()
    assert [row["trial"] for row in rows.table.to_pylist()] == [key for key, _ in others]
    assert "has 3 rows" in rows.left_out[0].reason
    storage.replace(file_name(one), _parquet(several.slice(0, 0)))
    assert "has 0 rows" in ledger.survey().left_out[0].reason


@pytest.mark.parametrize(
    "name", ["a-1_000", "a- 12", "a-012", "a--12", "a-\u0661", f"a-{'9' * 40}", "-12", "a-"]
)
def test_a_name_that_no_row_would_be_given_is_none(tmp_path: Path, name: str) -> None:
    storage = open_storage(tmp_path)
    storage.create(f"ledger/{name}.parquet", b"")
    ledger = Ledger(storage)
    assert ledger.ids() == ({("a-", 12)} if name == "a--12" else set())
    (odd,) = ledger.survey().left_out
    assert odd.file == f"ledger/{name}.parquet"


@pytest.mark.filterwarnings("ignore::orchestrator.compaction.CopyWarning")
@pytest.mark.parametrize("marks", ["none", "made up", "of another row"])
def test_a_planted_copy_overrides_no_row(compacted: Ledger, marks: str) -> None:
    storage, before = compacted.storage, compacted.read()
    forged = _forged(before, 0.01)
    if marks != "none":
        true = compacted._marks(observation_ids(before))
        values = ["sha256:00"] * 15 if marks == "made up" else [*[*true.values()][1:], "x"]
        forged = forged.append_column("file_mark", pa.array(values, pa.string()))
    for name in ("0.parquet", "zzz.parquet"):
        storage.replace(f"{COMPACTED}/{name}", _parquet(forged))
    assert compacted.read().to_pylist() == before.to_pylist()


def test_a_row_that_was_replaced_is_read_from_its_own_file_and_said(compacted: Ledger) -> None:
    name = next(name for name in compacted.ids() if compacted.find(name)["seed"] == 7)
    changed = _forged(_read_file(compacted, name), 1.5)
    compacted.storage.replace(file_name(name), _parquet(changed))
    with pytest.warns(CopyWarning, match="has copies of 1 rows whose own files"):
        rows = compacted.read().to_pylist()
    assert [row["loss"] for row in rows if row["seed"] == 7] == [1.5]


def test_a_copy_of_an_earlier_version_is_passed_over_with_a_word(compacted: Ledger) -> None:
    """It has no marks. The next run replaces it."""
    (name,) = copies(compacted.storage)
    rows = pq.read_table(io.BytesIO(compacted.storage.read(f"{COMPACTED}/{name}")))
    compacted.storage.replace(f"{COMPACTED}/{name}", _parquet(rows.drop_columns(["file_mark"])))
    with pytest.warns(CopyWarning, match="is of an earlier version"):
        assert _seeds(compacted.read()) == list(range(15))
    with pytest.warns(CopyWarning):
        compacted.compact()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _seeds(compacted.read()) == list(range(15))
    assert len(copies(compacted.storage)) == 1


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
    rows = compacted.read()
    write_copy(compacted.storage, rows, compacted._marks(observation_ids(rows)), older=())
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


@pytest.mark.slow
def test_a_copy_of_an_earlier_version_is_told_of_once_until_a_run_replaces_it(
    simulated_project: Callable[..., Project], isoflop: Callable[..., tuple[int, str, str]]
) -> None:
    project = simulated_project(measured=105, budgets=[1e10, 3e10, 9e10], seeds=[*range(7)])
    copy = f"{COMPACTED}/{project.ledger.compact()}"
    rows = pq.read_table(io.BytesIO(project.storage.read(copy)))
    project.storage.replace(copy, _parquet(rows.drop_columns(["file_mark"])))
    code, _, err = isoflop("fit", project.uri)
    assert code == 0
    words = " ".join(err.split())
    assert words.count(f"{copy} is of an earlier version") == 1
    assert "isoflop run with one of the project's sweeps (such as plans/NAME.toml in it)" in words
    assert "CopyWarning" not in words
    assert ".py" not in words
    assert isoflop("run", project.local / "plans/s.toml")[0] == 0
    assert "earlier version" not in isoflop("fit", project.uri)[2]
