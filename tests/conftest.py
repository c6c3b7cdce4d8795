"""What tests of several rooms share: ready-made trials and specs of tiny sweeps."""

from __future__ import annotations

import os
import re
import shutil
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainers.corpus import CorpusSource, Stdlib, load
from trainers.flops import flops_per_token
from trainers.recipes import identity, named
from trainers.registry import trainer_version
from trainers.shape import Shape
from trainers.trial import CorpusId, Trial

# What a script starts with `&` ignores Ctrl-C, and so would all that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeTrial = Callable[..., Trial]

HIDDEN = "NoDevFiles"
"""For CUDA_VISIBLE_DEVICES: no GPU for torch, and none for a Ray that counts them. It is set only
where GPUs are: a Ray whose nodes claim GPUs does not start with it."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests and all that they start, unless the marker `gpu` is asked for.

    Two processes of tests would meet on one, and what holds on a CPU to the bit would not.
    """
    asked = re.search(r"(?<!not )\bgpu\b", str(config.option.markexpr))
    there = shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*"))
    if there and not asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = HIDDEN


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") == HIDDEN:
        pytest.skip("GPUs are hidden from tests: ask for these with -m gpu")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none here")


STDLIB = Stdlib()


@pytest.fixture(scope="session", autouse=True)
def isoflop_cache() -> Iterator[Path]:
    """Where these tests store tokens, also those of the processes that they start."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFLOP_CACHE", directory)
        yield Path(directory)


def _public(name: str) -> Path:
    """A file of published points or schemas, no part of the project, which may not be here."""
    here = Path(__file__).parents[1] / "../shared/reference"
    path = Path(os.environ.get("ISOFLOP_REFERENCE", here)) / name
    if not path.exists():
        pytest.skip(f"no reference at {path}: ISOFLOP_REFERENCE names their directory")
    return path


@pytest.fixture(scope="session")
def chinchilla_csv() -> Path:
    """Figure 4 of Hoffmann et al. 2022, digitised by Besiroglu et al. 2024."""
    return _public("chinchilla_figure4_points.csv")


@pytest.fixture(scope="session")
def isoflop_csv() -> Path:
    """Three published IsoFLOP studies."""
    return _public("isoflop_points.csv")


@pytest.fixture(scope="session")
def kuberay_rayjob_schema() -> Path:
    """What KubeRay accepts as a RayJob."""
    return _public("kuberay_rayjobs_v1.schema.json")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database: making and migrating one takes seconds, so tests copy it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def make_trial() -> MakeTrial:
    """A pretraining trial of a width at a budget, by default of the mini recipe on the stdlib."""

    def make(
        width: int,
        budget: float,
        *,
        recipe: str = "mini",
        source: CorpusSource = STDLIB,
        seed: int = 0,
    ) -> Trial:
        corpus = load(source)
        shape = Shape(width=width, depth=2, heads=2, vocabulary=corpus.vocabulary, context=64)
        return Trial(
            trainer="pretrain",
            trainer_version=trainer_version("pretrain"),
            shape=shape,
            hyperparameters=named(recipe).resolve(shape, budget / flops_per_token(shape)),
            corpus=CorpusId(
                name=corpus.name,
                hash=corpus.hashes[0],
                heldout_hash=corpus.hashes[1],
                train_tokens=corpus.train_tokens,
                source=source,
            ),
            recipe=identity(recipe, named(recipe)),
            seed=seed,
        )

    return make


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep file of the simulated trainer, with the given lines replacing its defaults."""

    def write(extra: str = "", *, budgets: str = "[1e16, 1e17, 1e18]", simulated: str = "") -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(
            'name = "test"\ntrainer = "simulated"\nrecipe = "llama-adamw"\n'
            f"budgets = {budgets}\nsizes = 5\n{extra}\n"
            "[shapes]\naspect = 64\nhead_width = 32\ncontext = 1024\nwidth_multiple = 32\n"
            f"[simulated]\n{simulated}\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def farseer_csv() -> Path:
    """Sizes by tokens, as published with Farseer."""
    return _public("farseer_runs.csv")
