"""A sweep of the user's own program: its table, its keys, its rows, what travels, what runs."""

import dataclasses
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from analysis.errors import InputError
from cluster.machines import uniform
from cluster.placement import Placement, Unplaceable, place
from orchestrator.attempts import Attempts
from orchestrator.ledger import Ledger
from orchestrator.logs import file_name
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project, create_project, open_project
from orchestrator.shipping import pack
from orchestrator.spec import parse_spec, read_spec, to_toml
from orchestrator.storage import LocalStorage
from tests.orchestrator.workers import measurement
from trainers.command import Commanded
from trainers.flops import flops_per_token, params
from trainers.simulated import SimulatedSettings
from trainers.template import file_hash
from trainers.told import CommandError
from trainers.trial import Event, Measurement, Step
from trainers.workspace import Scratch

Run = Callable[..., tuple[int, str, str]]
EXAMPLE = Path(__file__).parents[2] / "examples/nanogpt/sweep.toml"
TRIAL = '"{width} {steps} {batch_tokens}"'
"""Placeholders that every program must be given."""
CORPUS = 'corpus = { kind = "declared", name = "x", version = "1", vocabulary = 50, tokens = 9e9 }'


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep of train.py beside it, with the given lines in its tables."""

    def write(
        run: str = '["{python}", "train.py"]',
        *,
        table: str = 'files = ["train.py"]',
        corpus: str = CORPUS.replace("9e9", "9_000_000_000"),
        program: str = "",
        extra: str = "",
    ) -> Path:
        (tmp_path / "train.py").write_text(textwrap.dedent(program))
        path = tmp_path / "sweep.toml"
        if "env =" not in run + table:
            table += f"\nenv = {{ TRIAL = {TRIAL} }}"
        path.write_text(
            f'name = "own"\ntrainer = "command"\n{corpus}\nbudgets = [1e9]\nsizes = 3\nspan = 4\n'
            f"[command]\nrun = {run}\n{table}\n{extra}\n"
        )
        return path

    return write


def test_a_command_is_planned_for_every_trial(sweep, tmp_path: Path) -> None:
    plan = make_plan(read_spec(sweep("\"{python} train.py --w={width} 'two words'\"")))
    assert len(plan.trials) == 3
    for trial in plan.trials:
        assert trial.command is not None
        assert trial.command.run == ("{python}", "train.py", "--w={width}", "two words")
        assert [name for name, _ in trial.command.files] == ["train.py"]
        assert trial.command.directory == str(tmp_path)
        assert (trial.shape.vocabulary, trial.corpus.name) == (50, "x")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_content_decides_keys_and_places_do_not(sweep, tmp_path: Path) -> None:
    def keys(path: Path) -> list[str]:
        return [trial.key for trial in make_plan(read_spec(path)).trials]

    first = keys(sweep())
    assert keys(sweep(table='files = ["train.py"]\ntimeout_seconds = 9.0\ngpus = 1.0')) == first
    assert keys(sweep(program="print()")) != first
    assert keys(sweep(table=f'files = ["train.py"]\nenv = {{ TRIAL = {TRIAL}, A = "b" }}')) != first
    assert keys(sweep('["{python}", "train.py", "x"]')) != first
    assert keys(sweep(corpus=CORPUS.replace("9e9", "8_000_000_000"))) != first
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere/sweep.toml"
    moved.write_text(sweep().read_text())
    (tmp_path / "elsewhere/train.py").write_text("")
    assert keys(moved) == first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"run": '["python", "--w={widht}"]'},
            "command.run is wrong: '--w={widht}' has the placeholder {widht}; there are width, ",
        ),
        ({"run": '["echo", "{"]'}, "command.run is wrong: '{' has a brace without its partner"),
        ({"run": "[]"}, "command.run is [], but it should have at least 1 item"),
        ({"run": '"python \'x"'}, "does not split into words: No closing quotation"),
        ({"table": 'env = { A = "{b}" }'}, "command.env is wrong: '{b}' has the placeholder {b}"),
        ({"table": 'env = { HF_TOKEN = "hf_abc" }'}, 'write env_from = ["HF_TOKEN"] in its place'),
        ({"table": 'env_from = ["A=b"]'}, "command.env_from holds a name that no variable can"),
        (
            {"table": 'env_from = ["A"]\nenv = { A = "b" }'},
            "command has A in env and in env_from: leave it out of one of them",
        ),
        ({"table": 'file = ["x"]'}, "unknown key 'command.file': did you mean 'files'?"),
        ({"table": "gpus = -1.0"}, "command.gpus is -1.0, but it should be greater than or equal"),
        ({"table": "timeout_seconds = 0.0"}, "command.timeout_seconds is 0.0, but it should be"),
        ({"table": "files = []"}, "command.run names the file train.py, whose content should"),
        ({"table": 'files = ["model/*.py"]'}, "no file matches 'model/*.py' of command.files in"),
        ({"table": 'files = ["/etc/hosts"]'}, "command.files has '/etc/hosts': name files relat"),
        ({"table": 'directory = "none"'}, "command.directory is /"),
        (
            {"corpus": 'corpus = { kind = "declared", name = "x", vocabulary = 5, tokens = 9 }'},
            "the key 'corpus.version' is missing",
        ),
        ({"corpus": CORPUS.replace("9e9", "9")}, "corpus x has 9 tokens to train on, and a pass"),
    ],
)
def test_a_wrong_table_is_a_sentence(isoflop: Run, sweep, given: dict, message: str) -> None:
    code, out, err = isoflop("plan", sweep(**given))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "hf_token"],
)
def test_a_secret_in_env_is_refused_without_being_shown(isoflop: Run, sweep, name: str) -> None:
    env = f'env = {{ TRIAL = {TRIAL}, {name} = "tr0ub4dor" }}'
    code, out, err = isoflop("plan", sweep(table=f'files = ["train.py"]\n{env}'))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"command.env sets {name}, whose name is that of a secret" in err
    assert "tr0ub4dor" not in err


@pytest.mark.parametrize("name", ["BATCH_TOKENS", "NUM_KEY_VALUE_HEADS"])
def test_a_number_of_tokens_is_no_secret(sweep, name: str) -> None:
    env = f'env = {{ TRIAL = {TRIAL}, {name} = "{{tokens}}" }}'
    assert make_plan(read_spec(sweep(table=f'files = ["train.py"]\n{env}'))).trials


def test_a_kept_plan_with_a_secret_in_env_opens(sweep) -> None:
    made = make_plan(read_spec(sweep())).to_dict()
    made["spec"]["command"]["env"]["HF_TOKEN"] = "abc"
    assert Plan.from_dict(json.loads(json.dumps(made))).spec.command.env["HF_TOKEN"] == "abc"


def test_names_of_env_from_are_planned_and_written_and_enter_no_key(sweep, tmp_path: Path) -> None:
    spec = read_spec(sweep(table='files = ["train.py"]\nenv_from = ["B_TOKEN", "A_KEY"]'))
    plan = make_plan(spec)
    assert {trial.command.env_from for trial in plan.trials} == {("A_KEY", "B_TOKEN")}
    again = tmp_path / "next.toml"
    again.write_text(to_toml(spec, "again"))
    assert read_spec(again) == spec
    plain = make_plan(read_spec(sweep()))
    assert [t.key for t in plain.trials] == [t.key for t in plan.trials]


def test_a_variable_that_is_not_set_here_is_named_before_ray_starts(
    isoflop: Run, sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("B_TOKEN", raising=False)
    path = sweep(table='files = ["train.py"]\nenv_from = ["B_TOKEN"]')
    code, _, err = isoflop("run", path, "--project", tmp_path / "project")
    assert code == 2
    assert "command.env_from names B_TOKEN, and the environment on" in err


@pytest.mark.parametrize(
    ("env", "extra", "message"),
    [
        ("", "", "have no {width}, so that all sizes would train one and the same model: give it"),
        ("{depth} {steps}", "", "have no {width}, so that all sizes"),
        ("{{width}} {steps}", "", "have no {width}, so that all sizes"),
        ("{steps}", "shapes = { aspect = 8.0, heads = 2 }", "have neither {width} nor {depth}, so"),
        (
            "{steps}",
            "shapes = { aspect = 8.0, head_width = 4 }",
            "have neither {width} nor {heads} nor {depth}, so that all sizes would train one",
        ),
        ("{width}", "", "have neither {tokens} nor {steps}, so that all trials would train equal"),
        (
            "{width} {steps}",
            "seeds = [1, 2]",
            "have no {seed}, so that the 2 seeds would train one and the same run: give it, as in "
            '"--seed={seed}", or one seed',
        ),
    ],
)
def test_a_program_that_is_not_told_its_trial_is_refused_when_the_file_is_read(
    sweep, env: str, extra: str, message: str
) -> None:
    path = sweep(table=f'files = ["train.py"]\nenv = {{ TRIAL = "{env}" }}')
    path.write_text(f"{extra}\n{path.read_text()}")
    with pytest.raises(InputError) as caught:
        read_spec(path)
    assert str(caught.value).startswith("sweep.toml: command.run and command.env ")
    assert message in str(caught.value)


def _grow(path: Path, aspect: float) -> None:
    """Make the sweep's models grow in depth with their widths."""
    sizes = "budgets = [1e9]\nsizes = 3\nspan = 4\n"
    assert sizes in path.read_text()
    grown = "budgets = [{ flops = 1e10, widths = [8, 16, 24] }]\n"
    grown += f"shapes = {{ aspect = {aspect}, heads = 2 }}\n"
    path.write_text(path.read_text().replace(sizes, grown))


def test_a_depth_may_stand_for_the_width_if_it_tells_the_sizes_apart(sweep) -> None:
    def plan(aspect: float) -> Plan:
        path = sweep(table='files = ["train.py"]\nenv = { TRIAL = "{depth} {tokens}" }')
        _grow(path, aspect)
        return make_plan(read_spec(path))

    assert {trial.shape.depth for trial in plan(8.0).trials} == {1, 2, 3}
    with pytest.raises(InputError, match=r"widths 8 and 16 have depth 1 both, and the command is"):
        plan(64.0)


def test_what_a_program_may_need_to_know_is_told(isoflop: Run, sweep) -> None:
    path = sweep(table='files = ["train.py"]\nenv = { TRIAL = "{width} {steps}" }')
    _grow(path, 8.0)
    out = isoflop("plan", path)[1]
    assert "! command: it is told none of {batch_tokens}, {sequences} and {tokens}, so" in out
    assert "! command: it is not told {depth}, which grows with the width (shapes.aspect)" in out


def test_a_plan_that_was_kept_by_an_older_isoflop_opens(sweep) -> None:
    made = make_plan(read_spec(sweep())).to_dict()
    made["spec"]["command"]["env"] = {}
    again = Plan.from_dict(json.loads(json.dumps(made)))
    assert again.spec.command.told == {"python"}


@pytest.mark.parametrize(
    "run",
    [
        '["{python}", "{here}/train.py"]',
        '["{python}", "./train.py"]',
        '["{python}", "-m", "train"]',
        '["torchrun", "-um", "package.train"]',
        '["{python}", "-m", "package"]',
        '["{python}", "-c", "0", "--config=conf.yaml"]',
        '["sh", "-c", "cd . && python train.py;"]',
        "\"sh -c 'python train.py'\"",
        '["x", "{width}", "{steps}"]\nenv = { CONFIG = "conf.yaml" }',
        '["x", "a b.yaml"]',
        '["x", "--a=a b.yaml"]',
    ],
)
def test_a_file_that_is_named_must_be_listed(sweep, tmp_path: Path, run: str) -> None:
    """Or its rows would be taken for those of what it has become."""
    (tmp_path / "package").mkdir()
    for name in ("conf.yaml", "a b.yaml", "package/train.py", "package/__main__.py"):
        (tmp_path / name).write_text("")
    path = sweep(run.replace("{here}", str(tmp_path)), table="")
    with pytest.raises(InputError, match=r"names the file (.*), whose content") as caught:
        make_plan(read_spec(path))
    (named,) = re.findall(r"names the file (.*?), whose", str(caught.value))
    table = f'files = ["{named}"]'
    listed = make_plan(read_spec(sweep(run.replace("{here}", str(tmp_path)), table=table)))
    (tmp_path / named).write_text("changed")
    changed = make_plan(read_spec(path))
    assert not {t.key for t in listed.trials} & {t.key for t in changed.trials}


@pytest.mark.parametrize(
    "run", ['["{python}", "-c", "' + "0;" * 999 + '"]', '["/bin/sh", "x"]', '["x", "-m", "data"]']
)
def test_a_program_of_which_no_file_is_known_is_told(isoflop: Run, sweep, run: str) -> None:
    """Neither are files elsewhere or large ones, which are data."""
    path = sweep(run, table="")
    with (path.parent / "data.py").open("w") as file:
        file.truncate(17 << 20)
    code, out, _ = isoflop("plan", path)
    assert code == 0
    assert "! command: files is empty, so that no key knows what the program is" in out
    told = json.loads(isoflop("plan", path, "--json")[1])["cautions"]
    assert ("command", 3) in [(caution["about"], caution["trials"]) for caution in told]
    assert "! command" not in isoflop("plan", sweep())[1]


def test_a_data_file_is_not_a_program(sweep, tmp_path: Path) -> None:
    with (tmp_path / "data.bin").open("w") as file:
        file.truncate(17 << 20)
    with pytest.raises(InputError, match=r"data.bin of 17,825,792 bytes, more than .* is the corp"):
        make_plan(read_spec(sweep(table='files = ["train.py", "data.bin"]')))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "command"}, 'trainer = "command" needs a table [command] with run'),
        ({"command": {"run": ["x"]}}, 'has a table [command], but trainer = "pretrain"'),
        (
            {"corpus": {"kind": "declared", "name": "x", "version": "1", "vocabulary": 5,
                        "tokens": 9}},
            'corpus.kind = "declared" is for trainer = "command" only',
        ),
    ],
)  # fmt: skip
def test_trainer_and_table_go_together(changes: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_spec({"name": "x", "budgets": [1e10], **changes}, source=Path("sweep.toml"))
    assert message in str(caught.value)


def test_a_command_survives_being_written_as_a_sweep_file(sweep, tmp_path: Path) -> None:
    table = (
        'files = ["train.py"]\nenv = { A = "b {width}", "C" = "{steps}" }\ntimeout_seconds = 60.0'
    )
    spec = read_spec(sweep(table=table))
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere/next.toml"
    again.write_text(to_toml(spec, "again"))
    assert read_spec(again) == spec
    assert make_plan(read_spec(again)).trials == make_plan(spec).trials


def test_the_programs_files_travel_with_the_sweep(sweep, tmp_path: Path) -> None:
    path = sweep(table='files = ["train.py", "model/*.py"]\ndirectory = "code"')
    (tmp_path / "code/model").mkdir(parents=True)
    (tmp_path / "train.py").rename(tmp_path / "code/train.py")
    (tmp_path / "code/model/gpt.py").write_text("")
    shipment = pack(path)
    assert sorted(shipment.files) == [
        "files/code/model/gpt.py",
        "files/code/train.py",
        "files/sweep.toml",
    ]
    path.write_text(path.read_text().replace('"code"', f'"{tmp_path}/code"'))
    assert sorted(pack(path).files) == ["files/sweep.toml"]


def test_files_may_lie_outside_of_the_directory(sweep, tmp_path: Path) -> None:
    path = sweep(table='files = ["../common/*.py", "train.py"]\ndirectory = "code"')
    for name in ("code", "common"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.py").rename(tmp_path / "code/train.py")
    (tmp_path / "common/model.py").write_text("")
    trial = make_plan(read_spec(path)).trials[0]
    assert [name for name, _ in trial.command.files] == ["../common/model.py", "train.py"]
    assert "files/common/model.py" in pack(path).files
    inner = tmp_path / "code/sweep.toml"
    inner.write_text(path.read_text().replace('"code"', '"."'))
    with pytest.raises(InputError, match=r"names .*/common/model\.py, which is not in .*/code"):
        pack(inner)
    assert "files/common/model.py" in pack(inner, tmp_path).files
    (tmp_path / "common/model.py").write_text("changed")
    with pytest.raises(
        InputError, match=r"/common/model\.py has hash .*: it changed, so plan again"
    ):
        list(Commanded().train(trial, Scratch(tmp_path)))


def test_a_command_takes_the_gpus_that_it_asks_for(sweep) -> None:
    cluster = uniform(nodes=1, gpus=4, gpu_type="H100", cpus=32)

    def placed(gpus: float) -> Placement | Unplaceable:
        table = f'files = ["train.py"]\ngpus = {gpus}'
        return place(make_plan(read_spec(sweep(table=table))).trials[0], cluster)

    assert [placed(gpus).label for gpus in (0.0, 0.2, 1.0, 2.0)] == [
        "1 core",
        "1/4 GPU",
        "1 GPU",
        "2 GPUs",
    ]
    assert "needs 8 GPUs, and there are 4" in str(placed(8.0))


def test_a_mended_program_takes_the_place_of_one_that_only_failed(sweep, tmp_path: Path) -> None:
    """Its trials are others. A row of the old one, or a checkpoint, would be lost to the plan."""
    project = create_project(tmp_path / "p")
    path = sweep(program="raise SystemExit(3)")
    broken = make_plan(read_spec(path))
    project.save_plan(broken)
    for trial in broken.trials:
        attempt = project.attempts.begin(trial, driver=1, node="n", pid=1)
        project.attempts.fail(attempt, kind="raised", error="exited with 3")
    (tmp_path / "train.py").write_text("mended")
    mended = make_plan(read_spec(path))
    project.save_plan(mended)
    (kept,) = project.plans()
    assert {t.key for t in kept.trials} == {t.key for t in mended.trials}
    project.attempts.begin(mended.trials[0], driver=1, node="n", pid=1)
    (tmp_path / "train.py").write_text("mended again")
    hashes = [file_hash(tmp_path / "train.py"), dict(mended.trials[0].command.files)["train.py"]]
    with pytest.raises(InputError) as caught:
        project.save_plan(make_plan(read_spec(path)))
    assert "differs in the command's file train.py ({}, was {}, by hash)".format(*hashes) in str(
        caught.value
    )


def test_what_bounds_a_horizon_is_named(sweep) -> None:
    path = sweep(corpus=CORPUS.replace("9e9", "10_000"))
    with pytest.raises(InputError) as caught:
        make_plan(read_spec(path))
    assert re.search(
        r"trains width \d+ on [\d,]+ tokens, [\d.]+ epochs of corpus x \([\d,]+ tokens\), and "
        r"epochs = 1 allows no more: give more text \(corpus\.tokens\), or set epochs = \d+",
        str(caught.value),
    )


def _filled(sweep: Path, project: Project) -> Project:
    """A project with every row of a sweep, by the law that `simulated` has by default."""
    plan = make_plan(read_spec(sweep))
    project.save_plan(plan)
    for trial in plan.trials:
        loss = SimulatedSettings().loss(params(trial.shape).non_embedding, trial.tokens)
        row = measurement(trial, tokens=trial.tokens, loss=loss, params=None, curve=())
        project.ledger.write(trial, row)
    return project


def test_a_proposal_that_runs_out_of_text_says_which_key_bounds_it(
    isoflop: Run, sweep, tmp_path: Path
) -> None:
    """The text just suffices for what was trained; at the next budget its best size needs more."""
    codes = []
    for tokens in (130_000, 90_000_000):
        path = sweep(corpus=CORPUS.replace("9e9", str(tokens)))
        budgets = ", ".join(
            f"{{ flops = {c}, widths = [12, 16, 20, 24, 28] }}" for c in (1e9, 2e9, 4e9)
        )
        path.write_text(path.read_text().replace("[1e9]", f"[{budgets}]"))
        project = _filled(path, create_project(tmp_path / str(tokens)))
        code, out, err = isoflop("propose", project.uri)
        codes.append(code)
        limited = re.search(
            r"at 8e\+09 FLOPs sizes of N up to [\d.]+k would need more than the 130k tokens that "
            r"the corpus has in epochs = 1: raise corpus\.tokens or epochs",
            out + err,
        )
        assert bool(limited) == (tokens == 130_000), out + err
    assert codes == [2, 0]


def test_a_row_has_what_the_program_declared(sweep, tmp_path: Path) -> None:
    first, second, third = make_plan(read_spec(sweep())).trials
    storage = LocalStorage(tmp_path / "p")
    storage.make()
    ledger = Ledger(storage)
    plain = measurement(first, params=None)
    declared = {"non_embedding": 10, "matmul": 20, "total": 30}
    ledger.write(first, plain)
    ledger.write(second, dataclasses.replace(
        plain, tokens=second.tokens, params=declared, flops=7e9, curve=plain.curve[:1]
    ))  # fmt: skip
    other = dataclasses.replace(third, command=dataclasses.replace(third.command, run=("y",)))
    ledger.write(other, dataclasses.replace(plain, tokens=third.tokens))
    rows = {row["trial"]: row for row in ledger.read().to_pylist()}
    ours, theirs = rows[first.key], rows[second.key]
    assert ours["flops_exact"] == flops_per_token(first.shape) * first.tokens
    assert [theirs[f"params_{n}"] for n in declared] == [10, 20, 30]
    assert (theirs["flops_exact"], theirs["flops_spent"]) == (7e9, 7e9)
    assert theirs["flops_6nd"] == 60 * second.tokens
    assert ours["trainer"] == theirs["trainer"] == f"command-1-{first.command.hash[:8]}"
    assert rows[other.key]["trainer"] != ours["trainer"]


# With Ray.


DIES_ONCE = """
import json, os, pathlib, signal, sys
steps, place = int(sys.argv[1]), pathlib.Path(sys.argv[2])
first = step = int((place / "state").read_text()) if (place / "state").exists() else 0
print(f"begins at {first}")
while step < steps:
    step += 1
    print(json.dumps({"step": step, "train_loss": 3.0}))
    if step % 10 == 0:
        (place / "state").write_text(str(step))
        print(json.dumps({"checkpoint": step}))
    if step == 15 and not first:
        os.kill(os.getpid(), signal.SIGKILL)
print(json.dumps({"loss": 2.0 + 1 / int(sys.argv[3])}))
"""


@pytest.mark.slow
def test_a_sweep_of_programs_that_die_ends_with_every_row(
    isoflop: Run, sweep, tmp_path: Path
) -> None:
    run = '["{python}", "train.py", "{steps}", "{checkpoint}", "{width}"]'
    path = sweep(run, program=DIES_ONCE, extra="[checkpoints]\nevery_steps = 10")
    code, out, err = isoflop("run", path, "--project", tmp_path / "project")
    assert code == 0, out + err
    project = open_project(tmp_path / "project")
    rows = project.ledger.read().to_pylist()
    assert [row["status"] for row in rows] == ["complete"] * 3
    assert {row["loss"] for row in rows} == {2.0 + 1 / row["width"] for row in rows}
    assert {row["resumed_from"] for row in rows} == {10}
    for row in rows:
        assert [point["step"] for point in row["curve"]] == list(range(1, len(row["curve"]) + 1))
        assert row["curve"][-1]["tokens"] == row["tokens"]
    failed = Attempts(project.storage).all()
    assert len(failed) == 3
    for attempt in failed:
        assert "was killed by SIGKILL" in attempt.error
        assert "begins at 0" in attempt.log


@pytest.mark.slow
def test_a_program_without_a_result_ends_as_failed_with_its_log(
    isoflop: Run, sweep, tmp_path: Path
) -> None:
    path = sweep(program="print('iter 1: loss 9')", extra="[limits]\nretries = 0")
    code, _, err = isoflop("run", path, "--project", tmp_path / "project")
    assert code == 1
    project = open_project(tmp_path / "project")
    assert project.ledger.ids() == set()
    for attempt in Attempts(project.storage).all():
        assert attempt.kind == "raised"
        assert "ended without a result" in attempt.error
        assert "iter 1: loss 9" in attempt.log
    assert "failed" in err


@pytest.mark.slow
def test_a_mistake_of_every_trial_stops_the_sweep_and_once_mended_it_does_the_rest(
    isoflop: Run, sweep, tmp_path: Path
) -> None:
    program = """
        import json, os
        _, steps, _ = os.environ["TRIAL"].split()
        print(json.dumps({"step": int(steps), "train_loss": 3.0}))
        print("its last words")
    """
    path = sweep(program=program)
    budgets = ", ".join(f"{{ flops = {c}, widths = [4, 8, 12] }}" for c in (1e9, 2e9, 4e9, 8e9))
    path.write_text(path.read_text().replace("[1e9]", f"[{budgets}]"))
    code, out, err = isoflop("run", path, "--project", tmp_path / "project", "--json")
    told = json.loads(out)
    assert code == 1, err
    project = open_project(tmp_path / "project")
    attempts = Attempts(project.storage).all()
    tried = {attempt.trial for attempt in attempts}
    assert len(attempts) == len(tried)  # none is tried again
    assert 3 <= len(tried) <= 3 + 4  # and those that ran meanwhile
    assert (told["complete"], told["failed"]) == (0, len(tried))
    assert len(told["not_started"]) == told["trials"] - len(tried)
    assert tried.isdisjoint(told["not_started"])
    assert re.search(r"width \d+ at \S+ FLOPs failed: .* ended without a result", err)
    assert err.count("| its last words") == 1
    assert f"{len(told['not_started'])} not started, since the first trials all failed alike" in err
    stopped = json.loads(isoflop("status", project.uri, "--json")[1])["not_started"]
    assert [item["trials"] for item in stopped] == [sorted(told["not_started"])]
    mended = textwrap.dedent(program) + "print('{\"loss\": 3.0}')\n"
    (tmp_path / "train.py").write_text(mended)
    code, out, err = isoflop("run", path, "--project", tmp_path / "project", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["complete"], told["not_started"]) == (told["trials"], [])
    status = json.loads(isoflop("status", project.uri, "--json")[1])
    assert (status["not_started"], status["plans"][0]["complete"]) == ([], told["trials"])
    rows = project.ledger.read().to_pylist()
    logs = [project.storage.read(file_name((row["trial"], row["tokens"]))) for row in rows]
    assert set(logs) == {b"its last words\n"}
    assert {row["resumed_from"] for row in rows} == {0}
    assert all(row["loss_step"] * row["batch_tokens"] == row["tokens"] for row in rows)


# The example.


def test_the_example_is_planned() -> None:
    plan = make_plan(read_spec(EXAMPLE))
    assert Counter(p.role for p in plan.planned) == {"grid": 12, "probe": 2}


@pytest.mark.slow
def test_the_example_goes_on_where_its_training_was_killed(tmp_path: Path) -> None:
    """The script itself, two processes below, by a real signal; then the same result as in one."""
    trial = make_plan(read_spec(EXAMPLE)).trials[3]
    places = [Scratch(tmp_path / name, every_steps=250) for name in ("killed", "whole")]
    with pytest.raises(CommandError, match="exited with"):
        _kill_at(300, Commanded().train(trial, places[0]))
    measured = []
    for place_ in places:
        *_, last = Commanded().train(trial, place_)
        assert isinstance(last, Measurement)
        measured.append(last)
    resumed, whole = measured
    assert (resumed.resumed_from, whole.resumed_from) == (250, 0)
    assert resumed.steps == whole.steps - 250
    assert (resumed.loss, resumed.curve) == (whole.loss, whole.curve)
    assert resumed.params == whole.params


@pytest.mark.slow
def test_the_example_that_was_killed_at_its_end_gives_its_result(tmp_path: Path) -> None:
    trial = make_plan(read_spec(EXAMPLE)).trials[0]
    last = trial.hyperparameters.steps
    place_ = Scratch(tmp_path, every_steps=last)
    first, again = (list(Commanded().train(trial, place_))[-1] for _ in range(2))
    assert isinstance(first, Measurement)
    assert isinstance(again, Measurement)
    assert (first.resumed_from, again.resumed_from) == (0, last)
    assert again.loss == first.loss


def _kill_at(step: int, events: Iterator[Event]) -> None:
    for event in events:
        if isinstance(event, Step) and event.step == step:
            there = psutil.Process().children(recursive=True)
            below = [p for p in there if p.status() != psutil.STATUS_ZOMBIE]
            (training,) = [p for p in below if "train_gpt.py" in p.cmdline()[1:2]]
            training.kill()
