"""What `isoflop run` and its like refuse around clusters, storages and plans, at no cost."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planner import make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import read_spec
from tests.orchestrator.workers import measurement

Run = Callable[..., tuple[int, str, str]]
MakeSweep = Callable[..., Path]


def _bad(isoflop: Run, *arguments: object) -> str:
    """An error for a person: exit code 2, one line on stderr, nothing on stdout."""
    code, out, err = isoflop(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("isoflop: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "use `isoflop submit SWEEP.toml --address http://HEAD:8265`"),
        ("http://head:8265", "http://HEAD:8265 is for `isoflop submit`"),
        ("head", "is neither `auto` nor HOST:PORT"),
    ],
)
def test_a_wrong_kind_of_address_writes_nothing(
    isoflop: Run, sweep_file: MakeSweep, tmp_path: Path, address: str, said: str
) -> None:
    project = tmp_path / "p"
    message = _bad(isoflop, "run", sweep_file(), "--project", project, "--address", address)
    assert said in message
    assert address in message
    assert not project.exists()


def test_an_address_where_nobody_listens_is_told_soon(
    isoflop: Run, sweep_file: MakeSweep, tmp_path: Path
) -> None:
    sweep, project = sweep_file(), tmp_path / "p"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # so that nobody else listens there meanwhile
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        message = _bad(isoflop, "run", sweep, "--project", project, "--address", address)
    assert time.monotonic() - started < 20
    assert f"no Ray cluster answers at {address}" in message
    assert not project.exists()


@pytest.mark.parametrize("verb", ["run", "status", "fit", "sync"])
def test_a_project_of_an_unknown_scheme_is_refused(
    isoflop: Run, sweep_file: MakeSweep, verb: str
) -> None:
    before = (sweep_file(), "--project") if verb == "run" else ()
    message = _bad(isoflop, verb, *before, "hdfs://host/p")
    assert "no storage is called hdfs://; give a path, file://, s3://, gs://" in message


def test_a_misspelt_law_is_told_which_ones_there_are(isoflop: Run) -> None:
    message = _bad(isoflop, "diagnose", "hofman-2022", "--params", 1e9, "--tokens", 1e10)
    assert "hofman-2022 is neither a file or project nor a published law of N and D" in message
    assert "hoffmann-2022" in message


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_named(isoflop: Run, sweep_file: MakeSweep) -> None:
    message = _bad(isoflop, "run", sweep_file(), "--project", "s3://no-such-bucket/p")
    assert "there is no bucket 'no-such-bucket'" in message


@pytest.fixture
def project(tmp_path: Path, sweep_file: MakeSweep) -> Project:
    """One that has the plan of the default sweep file, and one of its observations."""
    made = create_project(tmp_path / "project")
    plan = make_plan(read_spec(sweep_file()))
    made.save_plan(plan)
    made.ledger.write(plan.trials[0], measurement(plan.trials[0]))
    return made


def test_a_sweep_that_asks_for_more_is_refused_unless_it_may(
    isoflop: Run, sweep_file: MakeSweep, project: Project
) -> None:
    more = sweep_file(budgets="[1e16, 1e17, 1e18, 1e19]")
    message = _bad(isoflop, "run", more, "--project", project.local)
    assert f"project {project.uri} has another sweep called 'test'" in message
    assert "1e+19" in message
    assert "--extend" in message
    assert len(project.plans()[0].planned) == 15


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"budgets": "[1e16, 1e17]"}, "no longer asks for"),
        ({"simulated": "noise = 0.5"}, "simulated.noise (0.5, was 0.003)"),
    ],
)
def test_a_sweep_that_asks_for_something_else_is_refused_even_if_it_may_add(
    isoflop: Run, sweep_file: MakeSweep, project: Project, change: dict, difference: str
) -> None:
    other = sweep_file(**change)
    message = _bad(isoflop, "run", other, "--project", project.local, "--extend")
    assert difference in message
    assert "give this one another name" in message
    assert len(project.plans()[0].planned) == 15


def test_a_project_without_an_mlflow_store_cannot_be_synced(
    isoflop: Run, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    create_project(f"{bucket}/p")
    assert "--tracking-uri" in _bad(isoflop, "sync", f"{bucket}/p")


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("forecast", ("--flops", "banana"), "--flops: 'banana' is not a number: write one such as"),
        ("forecast", ("--flops", "1e21", "--served-tokens", "1,000"), "may be 1000 or 1.000"),
        ("diagnose", ("--params", "8x7B", "--tokens", "1T"), "--params: '8x7B' is not a number"),
        ("diagnose", ("--params", "7B", "--tokens", "5%"), "--tokens: '5%' is not a number"),
    ],
)
def test_a_number_that_cannot_be_read_is_quoted_back(
    isoflop: Run, verb: str, options: tuple[str, ...], message: str
) -> None:
    assert message in _bad(isoflop, verb, "besiroglu-2024", *options)


def test_options_take_numbers_as_they_are_printed(isoflop: Run) -> None:
    def printed(n: str, d: str) -> str:
        code, out, _ = isoflop("diagnose", "besiroglu-2024", "--params", n, "--tokens", d, "--json")
        assert code == 0
        return out

    assert printed("280B", "300 billion") == printed("2.8e11", "300_000_000_000")


def test_a_sweep_file_may_be_of_windows_and_its_numbers_as_printed(
    isoflop: Run, sweep_file: MakeSweep
) -> None:
    path = sweep_file(budgets="[1e16, 1e17, 864e18]")
    usual = isoflop("plan", path, "--json")
    text = path.read_text().replace("[1e16, 1e17, 864e18]", '["10 PFLOPs", "1e17", "10 PF-days"]')
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert isoflop("plan", path, "--json") == usual
    path.write_bytes(path.read_text("utf-16").replace("test", "größe").encode("cp1252"))
    assert "line 1 has the byte 0xf6" in _bad(isoflop, "plan", path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(13, "Permission denied", "/somewhere"), 2),
        (FileNotFoundError(2, "No such file or directory", "/somewhere"), 2),
        (OSError(28, "No space left on device"), 1),
        (ConnectionError("the store does not answer"), 1),
    ],
)
def test_what_a_person_can_mend_is_told_apart_by_the_exit_code(
    isoflop: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, code: int
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr("orchestrator.cli.app", app)
    assert isoflop("fit") == (code, "", f"isoflop: {error}\n")


def test_a_directory_too_long_for_rays_sockets_is_named(
    isoflop: Run, sweep_file: MakeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 90}")
    code, out, err = isoflop("run", sweep_file(), "--project", tmp_path / "p")
    assert (code, out) == (2, "")
    assert f"/tmp/{'x' * 90}" in "".join(err.split())
    assert "set RAY_TMPDIR to a short path" in err
