"""GPUs are hidden from tests, which would meet on one, unless they are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os
import pytest

def test_of_anything():
    import torch
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "NoDevFiles"
    assert torch.cuda.device_count() == 0

@pytest.mark.gpu
def test_of_a_gpu():
    pass
"""


def _pytest(tmp_path: Path, *arguments: str) -> str:
    """What pytest says of the two tests on a machine that has nvidia-smi."""
    path = tmp_path / "test_two.py"
    path.write_text(TESTS)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rs", *arguments, str(path)],
        env={**os.environ, "PYTHONPATH": str(root)}
        | {"CUDA_VISIBLE_DEVICES": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_gpu_that_is_there_is_hidden_and_its_tests_say_how_they_are_run(tmp_path: Path) -> None:
    said = _pytest(tmp_path)
    assert "1 passed, 1 skipped" in said
    assert "ask for these with -m gpu" in said


def test_tests_that_need_a_gpu_are_skipped_where_there_is_none(tmp_path: Path) -> None:
    import torch

    said = _pytest(tmp_path, "-m", "gpu")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "1 skipped, 1 deselected" in said
    assert "needs a GPU, and torch sees none here" in said
