"""What `isoflop submit` refuses before it asks any cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(isoflop: Run) -> Callable[..., str]:
    """The one sentence with which a submission ends; no cluster listens at its address."""

    def submit(*arguments: object) -> str:
        code, out, err = isoflop("submit", *arguments, "--address", "http://127.0.0.1:9")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "answers" not in err
        return err

    return submit


@pytest.mark.parametrize("project", [[], ["--project", "projects/x"]])
def test_a_project_that_the_cluster_cannot_see(
    refused: Callable[..., str], sweep_file: Callable[..., Path], project: list[str]
) -> None:
    assert "storage that all nodes of the cluster share" in refused(sweep_file(), *project)


@pytest.mark.parametrize(
    ("project", "words"),
    [
        ("http://foo/bar", "no storage is called http://"),
        ("ftp://foo/bar", "no storage is called ftp://"),
        ("s3://", "names no bucket"),
    ],
)
def test_a_project_that_is_no_storage(
    refused: Callable[..., str], sweep_file: Callable[..., Path], project: str, words: str
) -> None:
    assert words in refused(sweep_file(), "--project", project)


def test_a_bad_variable(refused: Callable[..., str], sweep_file: Callable[..., Path]) -> None:
    message = refused(sweep_file(), "--project", "/p", "--env", "X")
    assert message == "isoflop: --env X: write NAME=VALUE\n"


@pytest.mark.parametrize("option", ["--cancel", "--follow"])
def test_options_of_a_new_job_for_one_that_is_there(
    refused: Callable[..., str], option: str
) -> None:
    told = ("--no-wait", "--project", "/p", "--env", "A=1", "--extend")
    given = "--project, --extend, --no-wait, --env"
    assert f"{option} is of a job that is there, and {given} of a new" in refused(
        option, "job", *told
    )


SECRET = "tr0ub4dor"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        (
            "--tracking-uri",
            f"http://me:{SECRET}@host:5000",
            "MLFLOW_TRACKING_USERNAME and MLFLOW_T",
        ),
        ("--tracking-uri", f"https://{SECRET}@host", "MLFLOW_TRACKING_PASSWORD in the environment"),
        (
            "--tracking-uri",
            f"http://host/?password={SECRET}",
            "http://host/?password=*** has a pass",
        ),
        ("--tracking-uri", f"postgresql://me:{SECRET}@db/mlflow", "set MLFLOW_TRACKING_URI in the"),
        ("--env", f"HF_TOKEN={SECRET}", "--env sets the secret HF_TOKEN, and everybody who sees"),
        ("--env", f"INDEX=https://me:{SECRET}@host", "--env sets the secret INDEX"),
        (
            "--pip",
            f"git+https://me:{SECRET}@host/x",
            "set PIP_INDEX_URL in the environment in which",
        ),
    ],
)
def test_a_secret_in_an_option_is_refused_and_not_shown(
    refused: Callable[..., str],
    sweep_file: Callable[..., Path],
    option: str,
    value: str,
    words: str,
) -> None:
    message = refused(sweep_file(), "--project", "/p", option, value)
    assert words in message
    assert SECRET not in message


def test_a_sweep_that_names_files_elsewhere_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/id_rsa").write_text("mine")
    (tmp_path / "sweeps").mkdir()
    sweep = tmp_path / "sweeps/x.toml"
    sweep.write_text(
        'name = "x"\nbudgets = [1e10]\ncorpus = { kind = "files", glob = "../keys/*" }\n'
    )
    message = refused(sweep, "--project", "/p")
    assert f"{tmp_path}/keys/id_rsa, which is not in {tmp_path}/sweeps" in message
    # First what sends nothing: the directory may be one of large data.
    assert "by its absolute path on storage that all nodes share, or give --working-dir" in message


def test_a_token_file_that_others_can_read_gets_a_warning(
    isoflop: Run, sweep_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "token"
    path.write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    for mode, warned in ((0o644, True), (0o640, True), (0o600, False)):
        path.chmod(mode)
        address = ("--address", "http://127.0.0.1:9")
        code, _, err = isoflop("submit", sweep_file(), "--project", "/p", *address)
        assert code == 2  # nobody listens there
        warning = f"warning: other users of this machine may read the cluster's token in {path}"
        assert (warning in err) == warned
        assert (f"(its mode is {mode:04o})" in err) == warned


def test_a_run_on_a_cluster_warns_of_a_loose_token_file_too(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("orchestrator.connection.check", lambda address: address)
    code, _, err = isoflop("run", tmp_path / "none.toml", "--address", "127.0.0.1:9")
    assert code == 2
    assert "may read the cluster's token" in " ".join(err.split())
    assert "token" not in isoflop("run", tmp_path / "none.toml")[2]  # a Ray of its own has another


def test_submit_warns_before_its_token_goes_over_a_network_in_clear_text(
    isoflop: Run, sweep_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    address = ("--address", "http://nowhere.invalid:8265")  # RFC 2606: no such name resolves
    err = isoflop("submit", sweep_file(), "--project", "/p", *address)[2]
    assert "warning: the cluster's token goes to nowhere.invalid in clear text" in err
    err = isoflop("submit", sweep_file(), "--project", "/p", *address, "--no-auth")[2]
    assert "warning" not in err
