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
