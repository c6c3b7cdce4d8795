"""sweep.toml: what it means, and one clear sentence for each way to get it wrong."""

import json
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from analysis.errors import InputError
from cluster.budget import Caps
from orchestrator.planner import Plan, make_plan
from orchestrator.spec import Budget, SweepSpec, parse_spec, read_spec, to_toml, with_cluster
from orchestrator.spec_running import Limits
from trainers.corpus import Files, Markov, Mixture, Stdlib, TokenizerSource, load
from trainers.sources import named_files

ROOT = Path(__file__).parents[2]
HERE = Path("somewhere/sweep.toml")
FILES = {
    "kind": "files",
    "glob": "text/**/*.jsonl",
    "column": "body",
    "tokenizer": {"file": "tokenizer.json", "separator": '<"end">'},
    "heldout": {"code": "code/*.py", "the web": "web/*.parquet"},
}
MIXTURE = {
    "kind": "mixture",
    "parts": [
        {"kind": "files", "glob": "prose/*.txt", "weight": 0.7, "unique_tokens": 1_000_000},
        {"kind": "hugging_face", "dataset": "a/b", "tokens": 10**9, "weight": 0.3},
    ],
    "tokenizer": {"train": 4096},
    "heldout": {"code": "code/*.py"},
}
GOOD = {"name": "x", "budgets": [1e10, 3e10]}


def _error(**changes: object) -> str:
    with pytest.raises(InputError) as caught:
        parse_spec({**GOOD, **changes}, source=HERE)
    message = str(caught.value)
    assert message.startswith("sweep.toml: ")
    assert "\n" not in message
    return message.removeprefix("sweep.toml: ")


def test_a_spec_needs_a_name_and_budgets_only() -> None:
    spec = parse_spec(GOOD, source=HERE)
    assert spec.budgets == [Budget(flops=1e10), Budget(flops=3e10)]
    assert spec.corpus == Stdlib()
    assert (spec.sizes, spec.seeds, spec.epochs) == (7, [0], 1.0)


def test_numbers_of_flops_and_tokens_may_be_text_as_printed() -> None:
    def spec(
        one: object, ratio: object, limit: object, tokens: object, unique: object
    ) -> SweepSpec:
        web = {"kind": "hugging_face", "dataset": "a/b", "tokens": tokens, "weight": 0.3}
        prose = {**MIXTURE["parts"][0], "unique_tokens": unique}
        changes = {"corpus": {**MIXTURE, "parts": [prose, web]}, "tokens_per_param": ratio}
        data = {**GOOD, **changes, "budgets": [one], "limits": {"flops": limit}}
        return parse_spec(data, source=HERE)

    plain = spec(864e18, 20, 1e21, 10**10, 10**6)
    assert spec("10 PF-days", "20", "1 ZFLOP", "10B", "1M") == plain
    assert spec("8.64e20", 20.0, "1e21", 1e10, 1e6) == plain
    assert plain.budgets[0].flops == 8.64e20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgts": [1e9]}, "unknown key 'budgts': did you mean 'budgets'?"),
        ({"corpus": {"kind": "files", "globb": "x"}}, "did you mean 'glob'?"),
        ({"corpus": {"kind": "files", "glob": "x", "held_out": {}}}, "did you mean 'heldout'?"),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": {"trian": 999}}},
            "unknown key 'corpus.tokenizer.trian': did you mean 'train'?",
        ),
        (
            {"corpus": {"kind": "mixture", "parts": [{"kind": "files", "glob": "x", "wight": 1}]}},
            "unknown key 'corpus.parts[0].wight': did you mean 'weight'?",
        ),
        ({"shapes": {"depth": 2, "heads": 2, "contxt": 9}}, "did you mean 'context'?"),
        ({"budgets": []}, "budgets is [], but it should have at least 1 item"),
        ({"budgets": [1e9, -1]}, "budgets[1].flops is -1, but it should be greater than 0"),
        ({"simulated": {"noize": 0.1}}, "did you mean 'noise'?"),
        ({"budgets": [{"flops": 1e9, "width": [4]}]}, "did you mean 'widths'?"),
        ({"limits": {"gpu_hour": 9}}, "did you mean 'gpu_hours'?"),
        ({"checkpoints": {"every": 9}}, "did you mean 'every_steps'?"),
        ({"cluster": {"price_per_hour": 2.5}}, "did you mean 'price_per_gpu_hour'?"),
        ({"zzz": 1}, "unknown key 'zzz': the keys are name"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(changes: dict, message: str) -> None:
    assert message in _error(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": [-1e9]}, "budgets[0].flops is -1000000000.0, but it should be greater than 0"),
        ({"budgets": [0]}, "budgets[0].flops is 0, but it should be greater than 0"),
        ({"budgets": [float("inf")]}, "should be a finite number"),
        ({"budgets": ["1e18 J"]}, "budgets[0].flops: '1e18 J' is not a number: write one such"),
        ({"budgets": [{"flops": "much"}]}, "budgets[0].flops: 'much' is not a number"),
        ({"tokens_per_param": "20,000"}, "tokens_per_param: '20,000' may be 20000 or 20.000"),
        ({"budgets": [True]}, "budgets[0].flops is True, but it should be a valid number"),
        ({"budgets": []}, "at least 1 item"),
        ({"budgets": [1e9, 1e9]}, "budgets has the same value twice"),
        ({"sizes": 2}, "sizes is 2, but it should be greater than or equal to 3"),
        ({"budgets": [{"flops": 1e9, "widths": [4, 8]}]}, "at least 3 items"),
        ({"span": 1.0}, "span is 1.0, but it should be greater than 1"),
        ({"seeds": [1, 1]}, "seeds has the same value twice"),
        (
            {"recipe": "maxi"},
            "recipe is wrong: no recipe is called 'maxi'; there are mini, mini",
        ),
        ({"recipe": {"name": "muon", "rate": 1}}, "recipe muon has no 'rate'; it has architecture"),
        (
            {"recipe": {"name": "muon", "momentum": "x"}},
            "momentum is 'x', but it should be a valid",
        ),
        ({"corpus": {"kind": "fils"}}, "corpus.kind must be one of"),
        ({"corpus": {"kind": "files"}}, "the key 'corpus.glob' is missing"),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": "gpt2"}},
            "corpus.tokenizer is 'gpt2', but it should be \"bytes\" or a table such as { train = ",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": 4096}},
            'corpus.tokenizer is 4096, but it should be "bytes" or a table such as { train = ',
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": {"train": 100}}},
            "corpus.tokenizer has train = 100, but a trained vocabulary has 257",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": {"train": "4096"}}},
            "corpus.tokenizer.train is the string '4096': write the number without quotes",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": {}}},
            "corpus.tokenizer needs one of train, file and hub, but has none",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "tokenizer": {"hub": "a", "file": "b"}}},
            "corpus.tokenizer needs one of train, file and hub, but has file and hub",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "unique_tokens": 0}},
            "corpus has unique_tokens = 0, but they are at least 1",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "weight": 0.5}},
            "corpus.weight means nothing: it is for the parts of a mixture",
        ),
        (
            {"corpus": {"kind": "files", "glob": "x", "heldout": "web/*"}},
            "corpus.heldout is 'web/*', but it",
        ),
        (
            {"corpus": {"kind": "mixture", "parts": [{"kind": "files", "glob": "x"}]}},
            "corpus needs at least 2 parts, but has 1",
        ),
        (
            {"corpus": {"kind": "mixture", "parts": [{"kind": "files"}]}},
            "the key 'corpus.parts[0].glob' is missing",
        ),
        (
            {"corpus": {"kind": "mixture", "parts": [{"kind": "stdlib"}]}},
            "corpus.parts[0].kind must be one of 'files', 'hugging_face'",
        ),
        ({"shapes": {"heads": 2}}, "give either depth or aspect"),
        ({"simulated": {"noise": -1.0}}, "simulated has noise = -1, but it should be finite and"),
        (
            {"simulated": {"alpha": 0.0}},
            "simulated has alpha = 0, but it should",
        ),
        ({"simulated": {"hang": 1.5}}, "simulated has hang = 1.5, a chance"),
        ({"name": "../x"}, "name is '../x'"),
        (
            {"limits": {"slots": 0}},
            "limits.slots is 0, but it should be greater than or equal to 1",
        ),
        ({"limits": {"flops": "all"}}, "limits.flops: 'all' is not a number"),
        ({"span": "16"}, "span is the string '16': write the number without quotes"),
        (
            {"corpus": {"kind": "hugging_face", "dataset": "a/b", "tokens": "10 lines"}},
            "corpus.tokens: '10 lines' is not a number",
        ),
        (
            {"corpus": {"kind": "hugging_face", "dataset": "a/b", "tokens": "1.5"}},
            "corpus.tokens: '1.5' is not a whole number",
        ),
        (
            {"limits": {"deadline": -1}},
            "limits.deadline is -1, but it should be hours, more than 0",
        ),
        ({"limits": {"deadline": True}}, "limits.deadline is True: write hours"),
        ({"limits": {"deadline": "soon"}}, "limits.deadline is 'soon': write hours, such as 36"),
        (
            {"limits": {"deadline": "2026-12-01T08:00:00"}},
            "write it as 2026-12-01T08:00:00Z, in UTC",
        ),
        ({"limits": {"slow_factor": 0.5}}, "limits.slow_factor is 0.5"),
        ({"limits": {"money": 100.0}}, "money bounds nothing without cluster.price_per_gpu_hour"),
        ({"checkpoints": {"after": "burn"}}, "checkpoints.after is 'burn'"),
        ({"checkpoints": {"max_overhead": 0.0}}, "checkpoints.max_overhead is 0.0"),
        (
            {"cluster": {"gpu": "TPU v4"}},
            "gpu = 'TPU v4', which is no known type: give gpu_memory",
        ),
        (
            {"cluster": {"nodes": 4}},
            "cluster has nodes = 4, but nothing says of what: give gpu, such as H100, or",
        ),
        (
            {"limits": {"silent_seconds": "nevr"}},
            "silent_seconds is 'nevr', but it should be a number without quotes or \"never\"",
        ),
    ],
)
def test_an_impossible_value_is_named_with_its_bound(changes: dict, message: str) -> None:
    assert message in _error(**changes)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        read_spec(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(InputError, match="not valid TOML"):
        read_spec(tmp_path / "bad.toml")


def test_a_corpus_glob_is_relative_to_the_sweep_file(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('name = "s"\nbudgets = [1e9]\n[corpus]\nkind = "files"\nglob = "text/*.md"\n')
    assert read_spec(path).corpus == Files(glob=str(tmp_path / "text/*.md"))


def test_every_file_of_a_corpus_is_relative_to_the_sweep_file() -> None:
    here = HERE.parent.resolve()
    files = parse_spec({**GOOD, "corpus": FILES}, source=HERE).corpus
    assert isinstance(files, Files)
    assert files.glob == f"{here}/text/**/*.jsonl"
    assert isinstance(files.tokenizer, TokenizerSource)
    assert files.tokenizer.file == f"{here}/tokenizer.json"
    assert dict(files.heldout) == {
        "code": f"{here}/code/*.py",
        "the web": f"{here}/web/*.parquet",
    }
    mixture = parse_spec({**GOOD, "corpus": MIXTURE}, source=HERE).corpus
    assert isinstance(mixture, Mixture)
    assert [getattr(part, "glob", None) for part in mixture.parts] == [f"{here}/prose/*.txt", None]
    assert mixture.heldout["code"] == f"{here}/code/*.py"
    assert list(named_files(mixture)) == [f"{here}/code/*.py", f"{here}/prose/*.txt"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a/b", "a/b"),  # on the hub, whatever lies beside the sweep
        ("./a/b", "{here}/a/b"),
        ("../a", "{here}/../a"),
        ("/a/b", "/a/b"),
    ],
)
def test_a_directory_of_a_dataset_is_relative_to_the_sweep_file(written: str, read: str) -> None:
    here = HERE.parent.resolve()
    source = {"kind": "hugging_face", "dataset": written, "tokens": 10**6}
    alone = parse_spec({**GOOD, "corpus": source}, source=HERE).corpus
    other = source | {"name": "other", "dataset": "c"}
    mixture = parse_spec(
        {**GOOD, "corpus": {"kind": "mixture", "parts": [source, other]}}, source=HERE
    ).corpus
    assert isinstance(mixture, Mixture)
    wanted = read.format(here=here)
    assert (alone.dataset, mixture.parts[0].dataset) == (wanted, wanted)
    assert list(named_files(alone)) == ([f"{wanted}/**"] if wanted.startswith("/") else [])


def test_the_corpora_of_the_documentation_are_valid() -> None:
    text = (ROOT / "docs" / "trainers.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    kinds = {
        parse_spec({**GOOD, **tomllib.loads(block)}, source=HERE).corpus.kind for block in blocks
    }
    assert kinds == {"files", "mixture", "stdlib", "declared"}
    assert read_spec(ROOT / "examples" / "corpus.toml").corpus.kind == "files"


def test_a_plan_of_a_mixture_reads_back_the_same(tmp_path: Path) -> None:
    words = [f"{n} words that are many " * 100 for n in range(300)]
    for name in ("prose", "code", "web"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in words)
        )
    spec = parse_spec(
        {
            "name": "x",
            "budgets": [{"flops": 1e10, "widths": [8, 12, 16]}],
            "epochs": 2.0,
            "corpus": {
                "kind": "mixture",
                "tokenizer": {"train": 300},
                "heldout": {"web": "web.jsonl"},
                "parts": [
                    {"kind": "files", "glob": "prose.jsonl"},
                    {"kind": "files", "glob": "code.jsonl", "weight": 2.0},
                ],
            },
        },
        source=tmp_path / "sweep.toml",
    )
    plan = make_plan(spec)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert [t.key for t in again.trials] == [t.key for t in plan.trials]
    assert {t.shape.vocabulary for t in plan.trials} == {300}
    assert plan.trials[0].corpus.train_tokens == load(spec.corpus).train_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sizes": 9, "span": 4.5, "seeds": [3, 4], "recipe": "mini-adamw", "epochs": 2.0},
        {"corpus": {"kind": "markov", "symbols": 32}},
        {"corpus": {"kind": "stdlib", "unique_tokens": 200_000}},
        {"corpus": FILES},
        {"corpus": MIXTURE},
        {"trainer": "simulated", "simulated": {"E": 0.0, "noise": 0.001}},
        {"budgets": [{"flops": 3.24e12, "widths": [8, 12, 16]}, {"flops": 123456.789}]},
        {"shapes": {"aspect": 64.0, "head_width": 32, "context": 1024, "width_multiple": 32}},
        {
            "limits": {"flops": 1e20, "slots": 4, "deadline": 36.5, "slow_factor": "never"},
            "checkpoints": {"every_seconds": "never", "every_steps": 100, "after": "keep"},
            "cluster": {"gpu": "H100", "nodes": 8, "price_per_gpu_hour": 2.5},
        },
        {"limits": {"deadline": "2026-12-01T08:00:00+01:00"}},
    ],
)
def test_a_spec_written_as_toml_reads_back_the_same(tmp_path: Path, changes: dict) -> None:
    spec = parse_spec({**GOOD, **changes}, source=HERE)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(spec, "two\nlines"))
    assert read_spec(path) == spec
    assert path.read_text().startswith("# two\n# lines\n")


@pytest.mark.parametrize("text", ["\U0001f600/ü*.txt", "del \x7f", 'a "b"\n\t\\ \x01', "\u2028"])
def test_any_text_survives_being_written_as_toml(tmp_path: Path, text: str) -> None:
    command = {"run": ["python", "{width}{steps}", text], "env": {"A": text, text: "1"}}
    declared = {"kind": "declared", "name": text, "version": "1", "vocabulary": 9, "tokens": 99}
    changes = {"trainer": "command", "command": command, "corpus": declared}
    spec = parse_spec({**GOOD, **changes}, source=HERE)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(spec, "it"), encoding="utf-8")
    assert read_spec(path) == spec


def test_markov_symbols_are_the_default_where_not_given() -> None:
    assert parse_spec({**GOOD, "corpus": {"kind": "markov"}}, source=HERE).corpus == Markov()


def test_a_sweep_is_patient_and_unbounded_by_default() -> None:
    spec = parse_spec(GOOD, source=HERE)
    limits, checkpoints = spec.limits, spec.checkpoints
    assert (limits.retries, limits.restarts) == (2, 4)
    assert (limits.silent_seconds, limits.slow_factor) == (600.0, 5.0)
    assert limits.caps(None, datetime.now(UTC)) == Caps()
    assert (checkpoints.every_seconds, checkpoints.every_steps, checkpoints.keep) == (
        300.0,
        None,
        2,
    )
    assert spec.cluster.cluster() is None


def test_a_deadline_of_a_hundred_million_years_is_one() -> None:
    caps = Limits(deadline=1e12).caps(None, datetime.now(UTC))
    assert caps.deadline == 3.6e15


@pytest.mark.parametrize("deadline", [36, "2026-12-02T20:00:00Z", "2026-12-02T21:00:00+01:00"])
def test_a_deadline_is_hours_from_the_start_or_a_time(deadline: object) -> None:
    spec = parse_spec({**GOOD, "limits": {"deadline": deadline}}, source=HERE)
    started = datetime(2026, 12, 1, 8, tzinfo=UTC)
    assert spec.limits.caps(None, started).deadline == 36 * 3600


def test_how_a_sweep_runs_changes_none_of_its_trials() -> None:
    tables = {
        "limits": {"flops": 1e20, "slots": 4, "retries": 0},
        "checkpoints": {"every_steps": 10},
        "cluster": {"gpu": "H100", "nodes": 8},
    }
    plain, told = (make_plan(parse_spec({**GOOD, **t}, source=HERE)) for t in ({}, tables))
    assert [t.key for t in plain.trials] == [t.key for t in told.trials]


def test_the_cluster_of_a_spec_can_be_another() -> None:
    spec = parse_spec({**GOOD, "cluster": {"gpu": "H100", "nodes": 8}}, source=HERE)
    other = with_cluster(spec, gpu="A100", nodes=None, price_per_gpu_hour=2.0)
    assert str(other.cluster.cluster()) == "8 nodes of 8 GPUs A100 40GB and 64 cores"
    with pytest.raises(InputError, match=r"^--nodes is 0, but it should be greater than or equal"):
        with_cluster(spec, nodes=0)
