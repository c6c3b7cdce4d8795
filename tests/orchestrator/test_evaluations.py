"""Finished models in EleutherAI's lm-eval: its numbers are those of the model asked directly."""

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.errors import InputError
from orchestrator import evaluations
from orchestrator.models import fetch
from orchestrator.planner import make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec
from orchestrator.storage import Storage
from orchestrator.sync import sync
from orchestrator.tracking import store_of
from tests.orchestrator.test_models import finish
from trainers.scoring import TaskScore
from trainers.trial import Trial

Run = Callable[..., tuple[int, str, str]]
harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: the extra eval"
)
SPEC = {
    "name": "tiny",
    "recipe": "mini",
    "budgets": [{"flops": 4e8, "widths": [8, 12, 16]}],
    "corpus": {"kind": "stdlib"},
    "shapes": {"depth": 2, "heads": 2, "context": 64},
}
QUESTIONS = [
    ("def f(self", [") -> None:", "x y z"], 0),
    ("import ", ["os", "é, a word that is much longer than the sixty-four bytes of context"], 1),
    ("", ["return", "\n\n\n"], 0),
]
TEXTS = ["import os\n", "class A:\n    pass\n" * 20]


@pytest.fixture(scope="module")
def trial() -> Trial:
    return make_plan(parse_spec(SPEC, source=Path("tiny.toml"))).trials[-1]


@pytest.fixture(scope="module")
def project(trial: Trial, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Project:
    directory = tmp_path_factory.mktemp("evaluated")
    made = create_project(directory / "project")
    shutil.copy(empty_store, made.local / "mlflow.db")
    made.save_plan(make_plan(parse_spec(SPEC, source=Path("tiny.toml"))))
    finish(made, trial, directory / "scratch")
    sync(made, store_of(made))
    return made


def _metrics(project: Project, trial: Trial) -> dict[str, float]:
    """What MLflow says of the trial's scores."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store_of(project).uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "project")
    where = f"tags.`isoflop.trial` = '{trial.key}'"
    (run,) = client.search_runs([experiment.experiment_id], where)
    return {name: v for name, v in run.data.metrics.items() if name.startswith("eval/")}


class Direct:
    """The model asked for one byte at a time, with no more than its context before it."""

    def __init__(self, project: Project, trial: Trial) -> None:
        self.model = fetch(project, (trial.key, trial.tokens)).model

    @torch.no_grad()
    def next(self, before: bytes) -> torch.Tensor:
        window = torch.tensor([list(before[-64:])])
        return self.model(window)[0, -1].double().log_softmax(-1)

    def log_likelihood(self, before: bytes, text: bytes) -> float:
        """Of a text that fits into the context with what is before it."""
        assert len(before) + len(text) <= 65
        return sum(float(self.next(before + text[:i])[byte]) for i, byte in enumerate(text))

    def greedy(self, before: bytes, count: int) -> bytes:
        said = b""
        while len(said) < count:
            said += bytes([int(self.next(before + said).argmax())])
        return said


@pytest.fixture
def direct(project: Project, trial: Trial) -> Direct:
    return Direct(project, trial)


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task of lm-eval with its documents; gives their directory."""

    def write(name: str, documents: list[dict], **config: object) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **config,
        }
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # which YAML contains
        return tmp_path / "tasks"

    return write


@pytest.mark.slow
@harness
def test_scores_are_those_of_the_model_asked_directly(
    isoflop: Run, project: Project, trial: Trial, direct: Direct, tasks: Callable[..., Path]
) -> None:
    fitting = [(q, [c[:20] for c in choices], a) for q, choices, a in QUESTIONS]
    choice = [{"question": q, "choices": c, "answer": a} for q, c, a in fitting]
    tasks(
        "tiny_choice",
        choice,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    tasks(
        "tiny_text",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    # One that goes on otherwise where no document has ended before it.
    prompt = next(
        text
        for text in ("def ", "import ", "d", "(", "=", "a", "e", "t", "s", " ")
        if direct.greedy(b"\n" + text.encode(), 6) != direct.greedy(text.encode(), 6)
    )
    right = direct.greedy(b"\n" + prompt.encode(), 6).decode(errors="replace")
    where = tasks(
        "tiny_answer",
        [{"question": prompt, "answer": right}, {"question": prompt, "answer": "no"}],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["no such"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    named = "tiny_choice,tiny_text,tiny_answer"
    given = ("--tasks", named, "--include-path", where, "--project", project.local, "--json")
    code, out, err = isoflop("eval", trial.key[:8], *given)
    assert code == 0, err
    told = json.loads(out)
    found = {(row["task"], row["metric"]): row["value"] for row in told["results"]}

    def best(question: str, choices: list[str]) -> int:
        before = b"\n" + question.encode()  # after what ends a document of bytes
        return int(np.argmax([direct.log_likelihood(before, c.encode()) for c in choices]))

    accuracy = np.mean([best(q, choices) == answer for q, choices, answer in fitting])
    assert found["tiny_choice", "acc"] == pytest.approx(accuracy)
    assert found["tiny_answer", "exact_match"] == 0.5
    # Windows of up to 64 bytes, the last after as much as fits, as lm-eval documents them.
    nats, count = 0.0, 0
    for whole in (b"\n" + text.encode() for text in TEXTS):
        for start in range(1, len(whole), 64):
            end = min(start + 64, len(whole))
            window = torch.tensor([list(whole[max(0, end - 65) : end])])
            losses = direct.model.token_losses(window)[0].double()
            nats, count = nats + float(losses[-(end - start) :].sum()), count + end - start
    assert found["tiny_text", "bits_per_byte"] == pytest.approx(
        nats / count / math.log(2), rel=1e-6
    )
    assert told["mlflow"] == "written"
    kept = evaluations.read(project.storage).to_pylist()
    assert {(row["task"], row["metric"]): row["value"] for row in kept} == found
    metrics = _metrics(project, trial)
    assert metrics["eval/tiny_choice/0-shot/acc"] == found["tiny_choice", "acc"]
    code, out, err = isoflop(
        "eval", trial.key, *given[2:-1], "--tasks", "tiny_choice", "--limit", 1
    )
    assert (code, "tiny_choice" in out, "MLflow lacks" in out) == (0, True, False)
    assert "eval/tiny_choice/0-shot/first 1/acc" in _metrics(project, trial)


@pytest.mark.slow
@harness
def test_a_question_begins_after_a_separator_as_long_as_both_fit(direct: Direct) -> None:
    from trainers.harness import HarnessModel
    from trainers.tokenizer import BYTES

    asked = HarnessModel(direct.model, BYTES, torch.device("cpu"))
    long = b"x" * 62 + b"y"
    for before, after in ((b"import", b"\nimport"), (b"\n", b"\n"), (b"", b"\n"), (long, long)):
        ((said, _),) = asked._loglikelihood_tokens([(None, list(before), list(b" a"))])
        assert said == pytest.approx(direct.log_likelihood(after, b" a"), rel=1e-5)


@pytest.mark.slow
@harness
def test_tasks_that_are_not_there_or_want_samples_are_refused(
    isoflop: Run, project: Project, trial: Trial, tasks: Callable[..., Path]
) -> None:
    where = tasks(
        "sampled",
        [{"question": "a", "answer": "b"}],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "do_sample": True, "temperature": 1.0},
        metric_list=[{"metric": "exact_match"}],
    )
    given = ("--include-path", where, "--project", project.local)
    code, out, err = isoflop("eval", trial.key, "--tasks", "sampled", *given)
    assert (code, out, "asks for sampled answers" in err) == (2, "", True)
    code, out, err = isoflop("eval", trial.key, "--tasks", "sampled,arc_hard", *given)
    assert (code, out) == (2, "")
    assert re.search(r"has no task arc_hard nor in .*tasks: ", err)


def test_without_the_extra_one_sentence_says_what_to_install(
    isoflop: Run, simulated_project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    project = simulated_project(measured=1)
    code, out, err = isoflop("eval", "a", "--tasks", "arc_easy", "--project", project.local)
    assert (code, out) == (2, "")
    assert err == (
        "isoflop: eval needs EleutherAI's lm-eval, which is not installed here: "
        "pip install 'isoflop[eval]'\n"
    )


ACCURACY = TaskScore(
    task="hard:ones",
    task_version="1.0",
    metric="acc",
    filter="none",
    value=0.25,
    stderr=0.01,
    higher_is_better=True,
    num_fewshot=5,
    documents=400,
)


def _write(storage: Storage, *scores: TaskScore, limit: int | None = None) -> None:
    name = ("k" * 16, 1000)
    evaluations.write(storage, name, scores, limit=limit, harness="lm_eval 0", device="cpu")


def test_the_newest_evaluation_counts_and_others_stay(storage: Storage) -> None:
    perplexity = replace(ACCURACY, metric="perplexity", value=math.inf, stderr=None)
    _write(storage, ACCURACY, perplexity)
    _write(storage, replace(ACCURACY, num_fewshot=0, value=0.2))
    _write(storage, replace(ACCURACY, value=0.5), limit=10)
    _write(storage, replace(ACCURACY, value=0.75), perplexity)
    rows = evaluations.read(storage).to_pylist()
    assert {(row["metric"], row["num_fewshot"], row["limit"]): row["value"] for row in rows} == {
        ("acc", 0, None): 0.2,
        ("acc", 5, None): 0.75,
        ("acc", 5, 10): 0.5,
        ("perplexity", 5, None): math.inf,
    }
    assert len(rows) == 4
    (points,) = evaluations.points(storage).values()
    assert {name: value for name, value, _ in points if "stderr" not in name} == {
        "eval/hard_ones/0-shot/acc": 0.2,
        "eval/hard_ones/5-shot/acc": 0.75,
        "eval/hard_ones/5-shot/first 10/acc": 0.5,
    }
    storage.replace("evaluations/foreign.parquet", b"foreign")
    with pytest.raises(InputError, match=r"foreign\.parquet is damaged or no evaluation"):
        evaluations.read(storage)


@pytest.mark.slow
def test_an_mlflow_that_is_made_anew_has_the_scores_again(
    project: Project, trial: Trial, tmp_path: Path
) -> None:
    name = (trial.key, trial.tokens)
    project.storage.remove_all("evaluations")
    evaluations.write(
        project.storage, name, [ACCURACY], limit=None, harness="lm_eval 0", device="cpu"
    )
    assert sync(project, store_of(project)).evaluated == 1
    assert sync(project, store_of(project)).evaluated == 0
    assert _metrics(project, trial)["eval/hard_ones/5-shot/acc"] == 0.25
    store = store_of(project, f"sqlite:///{tmp_path / 'other.db'}")
    done = sync(project, store)
    assert (done.written, done.evaluated, done.differences) == (1, 1, [])
