"""Finished models: kept with their rows, exported, and what is said where there is none."""

import dataclasses
import errno
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from analysis.errors import InputError
from orchestrator.checkpoints import StoredWorkspace
from orchestrator.models import choose, fetch, file_name
from orchestrator.project import Project, create_project
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import LocalStorage, Storage
from tests.orchestrator.workers import Bench, bench_at, measurement
from trainers.corpus import Files, TokenizerSource, load
from trainers.decoders import LLAMA
from trainers.models import write_model
from trainers.pretrain import Pretrain
from trainers.tokenizer import BYTES
from trainers.transformer import Transformer
from trainers.trial import Event, Measurement, Trial
from trainers.workspace import Workspace

Run = Callable[..., tuple[int, str, str]]
KEY = "0123456789abcdef"


def _workspace(storage: Storage, scratch: Path, key: str = KEY, **settings: object):
    scratch.mkdir(parents=True, exist_ok=True)
    return StoredWorkspace(
        directory=scratch,
        storage=storage,
        key=key,
        settings=Checkpoints(**settings),
        stop=lambda: False,
        tell=lambda _: None,
    )


def finish(project: Project, trial: Trial, scratch: Path, **settings: object) -> None:
    """Train a trial and write its rows, as a worker does."""
    workspace = _workspace(project.storage, scratch, trial.key, **settings)
    for event in Pretrain().train(trial, workspace):
        if isinstance(event, Measurement):
            project.ledger.write(trial, event)


def small(trial: Trial, **changes: object) -> Trial:
    """The same in thirty steps."""
    few = {"batch_tokens": 512, "steps": 30, "warmup_steps": 2, **changes}
    h = dataclasses.replace(trial.hyperparameters, **few)
    return dataclasses.replace(trial, hyperparameters=h)


def test_a_model_is_whole_in_the_storage_and_the_last_one_counts(
    storage: Storage, tmp_path: Path
) -> None:
    workspace = _workspace(storage, tmp_path / "scratch")
    assert workspace.keeps_models
    for text in ("of an attempt that died", "measured"):
        workspace.keep_model(1000, lambda path, text=text: path.write_text(text))
    assert storage.names("models") == [f"{KEY}-1000.safetensors"]
    assert storage.read(file_name((KEY, 1000))) == b"measured"
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not _workspace(storage, tmp_path, models=False).keeps_models


def test_a_model_is_read_from_wherever_the_project_is(
    storage: Storage, make_trial, tmp_path: Path
) -> None:
    trial = make_trial(8, 1e8)
    weights = Transformer(trial.shape, seed=3).state_dict()
    write = partial(write_model, trial=trial, tokens=5, loss=2.5, tokenizer=BYTES, weights=weights)
    _workspace(storage, tmp_path / "scratch", trial.key).keep_model(5, write)
    kept = fetch(Project(storage), (trial.key, 5))
    assert (kept.trial, kept.tokens, kept.loss, kept.tokenizer) == (trial, 5, 2.5, BYTES)
    torch.testing.assert_close(dict(kept.model.state_dict()), dict(weights), rtol=0, atol=0)


def test_a_model_waits_for_a_storage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "project")
    storage.make()
    upload, failures = LocalStorage.upload, iter([OSError(errno.ENOSPC, "No space left")])

    def fail_first(self: LocalStorage, path: Path, name: str) -> None:
        for error in failures:
            raise error
        upload(self, path, name)

    monkeypatch.setattr(LocalStorage, "upload", fail_first)
    told: list[str] = []
    workspace = _workspace(storage, tmp_path / "scratch")
    workspace.tell = told.append
    workspace.keep_model(7, lambda path: path.write_text("weights"))
    assert told == ["cannot store the model: No space left; trying again"]
    assert storage.read(file_name((KEY, 7))) == b"weights"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with bench_at(LocalStorage(tmp_path / "project"), tmp_path, monkeypatch) as made:
        yield made


@dataclasses.dataclass
class Keeping:
    """A trainer that leaves a model, and dies before it tells the measurement if it should."""

    model: str
    dies: bool

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        workspace.keep_model(trial.tokens, lambda path: path.write_text(self.model))
        if self.dies:
            raise MemoryError
        yield measurement(trial)


def test_a_death_between_model_and_row_leaves_one_model_in_the_end(bench: Bench) -> None:
    with pytest.raises(MemoryError):
        bench.run(Keeping("the first", dies=True))
    name = bench.trial.key, bench.trial.tokens
    assert bench.storage.names("models") == [Path(file_name(name)).name]
    with pytest.raises(InputError, match="its ledger is empty"):
        choose(Project(bench.storage), bench.trial.key, None)
    bench.run(Keeping("the second", dies=False))
    assert bench.row is not None
    assert bench.storage.names("models") == [Path(file_name(name)).name]
    assert bench.storage.read(file_name(name)) == b"the second"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short documents of words."""
    random.seed(0)
    words = ["".join(random.choices("etaoinsré ", k=random.randint(2, 7))) for _ in range(300)]
    documents = [" ".join(random.choices(words, k=200)) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def llama(make_trial, text: Path) -> Trial:
    """Llama-like, on the tokens of a BPE trained on that text."""
    source = Files(glob=str(text), tokenizer=TokenizerSource(train=300))
    trial = small(make_trial(16, 1e9, recipe="llama-adamw", source=source))
    shape = dataclasses.replace(trial.shape, architecture=LLAMA)
    return dataclasses.replace(trial, shape=shape)


@pytest.fixture(scope="module")
def trunk(make_trial) -> Trial:
    """Two horizons of a recipe that is no Llama, on bytes."""
    trial = small(make_trial(16, 1e9), schedule="wsd", decay_fraction=0.2)
    return dataclasses.replace(trial, horizons=(7680, 15360))


@pytest.fixture(scope="module")
def project(llama: Trial, trunk: Trial, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Both of them, and one whose sweep keeps no models."""
    directory = tmp_path_factory.mktemp("models")
    made = create_project(directory / "project")
    finish(made, llama, directory / "scratch")
    finish(made, trunk, directory / "scratch")
    finish(made, dataclasses.replace(llama, seed=1), directory / "scratch", models=False)
    return made


@pytest.mark.slow
def test_an_exported_model_gives_the_same_logits_and_tokens_and_generates(
    isoflop: Run,
    project: Project,
    llama: Trial,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokenizer is its own, where its corpus is gone and no machine has it in its cache."""
    import transformers

    own = load(llama.corpus.source).tokenizer
    document = json.loads(text.read_text().splitlines()[0])["text"]
    text.unlink()
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "nothing"))
    target = tmp_path / "exported"
    code, out, err = isoflop(
        "export", llama.key[:9], "-o", target, "--project", project.local, "--json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["trial"], told["tokens"]) == (llama.key, llama.tokens)
    assert told["files"] == sorted(path.name for path in target.iterdir())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target)
    ours = fetch(project, (llama.key, llama.tokens)).model
    assert theirs.dtype == ours.embedding.dtype == torch.bfloat16  # as it was measured
    theirs, ours = theirs.float(), ours.float()
    inputs = torch.randint(300, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, ours(inputs), rtol=1e-5, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(target)
    (tokens,) = own.encode([document.encode()])
    assert words(document).input_ids == tokens.tolist()
    assert words.decode(tokens) == document
    assert words.eos_token_id == own.separator == theirs.generation_config.eos_token_id
    prompt = words(document[:40], return_tensors="pt")
    said = theirs.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert prompt.input_ids.shape[1] < said.shape[1] <= prompt.input_ids.shape[1] + 5


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_with_what_to_do(
    isoflop: Run, project: Project, llama: Trial, trunk: Trial, tmp_path: Path
) -> None:
    def refusal(*arguments: object) -> str:
        given = ("-o", tmp_path / "out", "--project", project.local)
        code, out, err = isoflop("export", *arguments, *given)
        assert (code, out) == (2, "")
        assert not (tmp_path / "out").exists()
        return err

    unkept = dataclasses.replace(llama, seed=1).key
    assert "7680, 15360 tokens" in refusal(trunk.key)
    assert "not at 7: choose one with --tokens" in refusal(trunk.key, "--tokens", 7)
    assert "has no norm layer" in refusal(trunk.key, "--tokens", 7680)
    assert "models = false in [checkpoints]" in refusal(unkept)
    typo = ("0" if llama.key[0] != "0" else "1") + llama.key[1:]
    assert f"near are {llama.key}" in refusal(typo)
    assert "has measured no trial 'zz'" in refusal("zz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = isoflop("export", llama.key, "-o", tmp_path / "full", "--project", project.local)
    assert (code, "not an empty directory" in err) == (2, True)


def test_trials_without_weights_and_keys_of_several_are_explained(simulated_project) -> None:
    project = simulated_project(measured=5)
    keys = sorted({key for key, _ in project.ledger.ids()})
    with pytest.raises(InputError, match=r"'': it has \w{16}, "):
        choose(project, "", None)
    name = choose(project, keys[0], None)
    with pytest.raises(InputError, match=r"its trainer, simulated-.*, leaves none"):
        fetch(project, name)


def test_the_project_is_the_one_that_is_here(
    isoflop: Run, simulated_project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(directory: Path) -> str:
        monkeypatch.chdir(directory)
        return isoflop("export", "zz", "-o", tmp_path / "out")[2]

    assert "which project? there is none" in said(tmp_path)
    only = simulated_project(at="projects/a").local
    assert f"{only} has measured no trial" in said(tmp_path)
    assert f"{only} has measured no trial" in said(only)
    simulated_project(at="projects/b")
    assert "which project? projects/ has a, b" in said(tmp_path)
