"""Secrets in the driver's environment reach trials on this machine, and no file or command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from orchestrator.propagation import keep_secrets_here

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "DATABRICKS_TOKEN",
    "GITHUB_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "OPENAI_API_KEY",
    "RAY_AUTH_TOKEN",
    "WANDB_API_KEY",
)
SECRETS = {name: f"planted{name.replace('_', '').lower()}0123456789" for name in NAMES}


def _planted(text: str) -> set[str]:
    return {name for name, value in SECRETS.items() if value in text}


def _files(*directories: Path) -> Iterator[tuple[Path, str]]:
    """All regular files below directories, with what is in them; some go meanwhile."""
    for directory in directories:
        for path in directory.rglob("*"):
            try:
                if path.is_file() and not path.is_symlink():
                    yield path, path.read_bytes().decode("latin-1")
            except OSError:
                continue


def _command_lines() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        yield " ".join(process.info["cmdline"] or [])


@pytest.mark.slow
def test_no_file_and_no_command_line_of_a_sweep_has_a_secret_of_its_environment(
    sweep_file: Callable[..., Path],
) -> None:
    """The session's files are looked at while it runs: they go with it."""
    sweep = sweep_file(budgets="[1e16, 1e17]", simulated="seconds = 2.0")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary:
        project = sweep.parent / "project"
        code = "from orchestrator.cli import main; main()"
        command = [sys.executable, "-c", code, "run", str(sweep), "--project", str(project)]
        unset = ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        leaks: dict[str, set[str]] = {}
        names: set[str] = set()
        with (sweep.parent / "output").open("w+") as output:
            process = subprocess.Popen(
                command,
                env={**inherited, **SECRETS, "TMPDIR": temporary},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                limit = time.monotonic() + 900
                while process.poll() is None:
                    assert time.monotonic() < limit
                    for path, text in _files(Path(temporary), project):
                        names.add(path.name)
                        if secrets := _planted(text):
                            leaks[str(path)] = secrets
                    for line in _command_lines():
                        if secrets := _planted(line):
                            leaks[line] = secrets
                    time.sleep(0.3)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            printed = output.read()
        for path, text in _files(project):
            names.add(path.name)
            if secrets := _planted(text):
                leaks[str(path)] = secrets
    assert process.returncode == 0, printed
    assert not _planted(printed)
    assert {"gcs_server.out", "raylet.out", "mlflow.db", "report.html"} <= names
    assert any(name.startswith("runtime_env_setup") for name in names)
    assert any(name.startswith("python-core-worker") for name in names)
    assert leaks == {}


def test_a_ray_that_keeps_the_names_elsewhere_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.delattr(class_cache, "ENV_VARS_TO_PROPAGATE")
    assert keep_secrets_here() is None
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    warning = keep_secrets_here()
    assert warning is not None
    assert "may write AWS_* variables of this process into its logs" in warning
    assert "secret" not in warning


def test_this_ray_still_keeps_the_names_where_they_are_taken_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails after an upgrade that moves them: then look where they went."""
    from ray.tune.execution import class_cache

    names = set(class_cache.ENV_VARS_TO_PROPAGATE) | {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert keep_secrets_here() is None
    monkeypatch.setattr(class_cache.ray, "remote", lambda **options: lambda _: options)
    options = class_cache._ActorClassCache().get(SimpleNamespace)
    assert not set(options["runtime_env"]["env_vars"]) & set(SECRETS)
