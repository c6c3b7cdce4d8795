"""Text for corpora, a cache that is empty, and trials of a program."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.trainers.commands import MakeCommand, commanded_trial
from trainers import corpus
from trainers.workspace import Scratch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that remembers no corpus."""
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "cache"))
    corpus._loaded.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """400 documents of 200 to 4000 characters: made-up words, some of them beyond ASCII."""
    rng = np.random.default_rng(0)
    letters = np.array([*"etaoinshrdlu", "é", "ß", "中"])
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(2000)]
    return [
        f"{number}: " + " ".join(rng.choice(words, rng.integers(40, 600))) + "\n"
        for number in range(400)
    ]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def commanded(make_trial, tmp_path: Path) -> MakeCommand:
    """Makes a trial whose command is a Python program, in a directory of its own."""
    return partial(commanded_trial, make_trial(24, 4e10), tmp_path)


@pytest.fixture
def workspace(tmp_path: Path) -> Scratch:
    (tmp_path / "scratch").mkdir()
    return Scratch(tmp_path / "scratch")
