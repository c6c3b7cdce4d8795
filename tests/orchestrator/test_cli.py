"""The command line: exit codes, one sentence an error, nothing written, and quick help."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.lease import hold
from orchestrator.ledger import Ledger
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec
from trainers.registry import trainer
from trainers.workspace import Scratch

Run = Callable[..., tuple[int, str, str]]
LARGE = {"aspect": 64.0, "head_width": 32, "width_multiple": 32}
VERBS = (
    "mini",
    "run",
    "plan",
    "submit",
    "doctor",
    "status",
    "tune",
    "sync",
    "verify",
    "fit",
    "forecast",
    "diagnose",
    "propose",
    "report",
    "export",
    "eval",
    "add",
    "ui",
)


def _files(project: Project) -> list[Path]:
    """The files of a ledger."""
    return sorted((project.local / "ledger").glob("*.parquet"))


def _fill(project: Project, spec: dict) -> Plan:
    """Measure a simulated sweep into a project, without Ray."""
    plan = make_plan(parse_spec({"trainer": "simulated", **spec}, source=Path("s.toml")))
    project.save_plan(plan)
    for trial in plan.trials:
        *_, measurement = trainer("simulated").train(trial, Scratch(Path("nowhere")))
        Ledger(project.storage).write(trial, measurement)
    return plan


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = create_project(tmp_path / "project")
    _fill(made, {"name": "s", "budgets": [1e16, 1e17, 1e18], "sizes": 5, "shapes": LARGE})
    yield made
    assert not list(made.local.rglob("*.tmp"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(isoflop: Run, verb: str) -> None:
    code, out, _ = isoflop(verb, "--help")
    assert code == 0
    assert f"isoflop {verb}" in out.split("Example:")[1]


def test_help_lists_the_verbs_in_the_order_of_their_use(isoflop: Run) -> None:
    _, out, _ = isoflop("--help")
    assert re.findall(r"^│ (\w+)", out.split("Commands")[1], re.MULTILINE) == list(VERBS)


def test_help_imports_nothing_heavy() -> None:
    """What keeps `isoflop --help` under half a second."""
    code = (
        "import sys; sys.argv = ['isoflop', '--help']\n"
        "from orchestrator.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'scipy', 'numpy', 'matplotlib', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stderr.strip() == "[]"
    assert "forecast" in result.stdout


def test_a_driver_imports_no_torch() -> None:
    """Which takes seconds, and which only those need that train."""
    code = "import sys, orchestrator.loop; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reader_that_goes_away_ends_nothing() -> None:
    """As `tee` does on Ctrl-C, while the driver still waits for checkpoints."""
    code = (
        "import sys\n"
        "from orchestrator.options import console\n"
        "out = console(stderr=True)\n"
        "input()\n"
        "out.print('stopping'); out.print('stopped')\n"
        "print('isoflop: interrupted', file=sys.stderr, flush=True)\n"
        "print('isoflop: interrupted', flush=True)\n"
        "sys.exit(130)"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    program.stdout.close()
    program.stdin.write(b"\n")
    program.stdin.close()
    assert program.wait(30) == 130


def test_fit_prints_one_json_object(isoflop: Run, project: Project) -> None:
    code, out, err = isoflop("fit", project.local, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["observations"] == 15
    assert found["convention"] == {"params": "non_embedding", "flops": "exact"}
    assert set(found["exponents"]) == {"hoffmann", "generalised", "kaplan", "isoflop"}
    for item in found["exponents"].values():
        assert {"a", "a_interval", "level", "params", "flops"} <= set(item)
    assert set(found["vertices"][0]) >= {"flops", "params", "tokens", "loss", "status"}


def test_conventions_change_the_answer_and_are_named(isoflop: Run, project: Project) -> None:
    _, exact, _ = isoflop("fit", project.local, "--json")
    _, total, _ = isoflop("fit", project.local, "--json", "--params", "total", "--flops", "6nd")
    one, other = json.loads(exact), json.loads(total)
    assert other["convention"] == {"params": "total", "flops": "6nd"}
    assert one["exponents"]["hoffmann"]["a"] != other["exponents"]["hoffmann"]["a"]


def test_forecast_and_propose_agree_with_fit(isoflop: Run, project: Project, tmp_path) -> None:
    _, out, _ = isoflop("forecast", project.local, "--flops", "1e19", "--json")
    forecast = json.loads(out)
    assert forecast["params_interval"][0] < forecast["params"] < forecast["params_interval"][1]
    assert forecast["tokens_per_param"] == pytest.approx(forecast["tokens"] / forecast["params"])
    output = tmp_path / "next.toml"
    _, out, _ = isoflop("propose", project.local, "--flops", "1e19", "-o", output, "--json")
    proposal = json.loads(out)
    assert proposal["params"] == pytest.approx(forecast["params"])
    assert proposal["span"][0] < forecast["params_interval"][0]
    assert isoflop("plan", output)[0] == 0


@pytest.mark.parametrize("spend", [3.1e19, 5e19, 7.01e19])
def test_a_proposal_stays_within_its_spend(
    isoflop: Run, project: Project, tmp_path: Path, spend: float
) -> None:
    output = tmp_path / "next.toml"
    isoflop("propose", project.local, "--flops", "1e19", "--spend", spend, "-o", output)
    _, out, _ = isoflop("plan", output, "--json")
    planned = json.loads(out)
    assert 0.7 * spend < planned["flops"] <= spend
    assert len(planned["trials"]) >= 3


def test_status_counts_observations(isoflop: Run, project: Project) -> None:
    next(iter(_files(project))).unlink()
    _, out, _ = isoflop("status", project.local, "--json")
    (plan,) = json.loads(out)["plans"]
    others = {"diverged": 0, "failed": 0, "running": 0}
    assert plan == {"name": "s", "complete": 14, "waiting": 1, **others}
    assert "14" in isoflop("status", project.local)[1]


def _bad(isoflop: Run, *arguments: object) -> str:
    """An error for a person: exit code 2, one line on stderr, nothing on stdout."""
    code, out, err = isoflop(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("isoflop: ")
    assert err.count("\n") == 1
    return err


def test_a_bad_spec_writes_nothing(isoflop: Run, tmp_path: Path) -> None:
    spec = tmp_path / "bad.toml"
    spec.write_text('name = "bad"\nbudgts = [1e10]\n')
    message = _bad(isoflop, "run", spec, "--project", tmp_path / "p")
    assert "did you mean 'budgets'?" in message
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('corpus = {kind = "files", glob = "none/*.txt"}', "no file matches"),
        ('corpus = {kind = "files", glob = "small.txt"}', "to hold out a part"),
        ('corpus = {kind = "markov", tokens = 200_000}', "epochs of corpus"),
        ('corpus = {kind = "markov", symbols = 300}', "2 to 256 symbols"),
        ("shapes = {depth = 2, heads = 3}", "no multiple of 6"),
        ("seeds = [-1]", "greater than or equal to 0"),
    ],
)
def test_a_sweep_that_cannot_be_planned_writes_nothing(
    isoflop: Run, tmp_path: Path, lines: str, message: str
) -> None:
    (tmp_path / "small.txt").write_text("small")
    spec = tmp_path / "bad.toml"
    spec.write_text(f'name = "x"\n{lines}\nbudgets = [{{flops = 4e10, widths = [16, 20, 32]}}]\n')
    assert message in _bad(isoflop, "run", spec, "--project", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_budget_too_small_for_a_step_writes_nothing(isoflop: Run, tmp_path: Path) -> None:
    spec = tmp_path / "bad.toml"
    spec.write_text('name = "x"\nbudgets = [{flops = 1e6, widths = [4, 8, 12]}]\n')
    assert "buys width 4 only" in _bad(isoflop, "run", spec, "--project", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_second_driver_is_refused_and_names_the_first(
    isoflop: Run, project: Project, sweep_file: Callable[..., Path]
) -> None:
    with hold(project.storage, "a sweep"):
        message = _bad(isoflop, "run", sweep_file(), "--project", project.local)
    assert f"another isoflop (process {os.getpid()} on" in message
    assert len(project.plans()) == 1


def test_a_damaged_ledger_is_noticed_before_anything_is_planned(
    isoflop: Run, project: Project, sweep_file: Callable[..., Path]
) -> None:
    path = _files(project)[0]
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in _bad(isoflop, "run", sweep_file(), "--project", project.local)
    assert [plan.name for plan in project.plans()] == ["s"]


@pytest.mark.parametrize("name", ["attempts/abc-1.json", "plans/s.json"])
def test_a_damaged_record_is_named(isoflop: Run, project: Project, name: str) -> None:
    path = project.local / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"trial": ')
    code, out, _ = isoflop("status", project.local)
    assert code == 0
    assert f"! left out: {path}" in " ".join(out.split())


def test_two_truths_and_two_corpora_are_two_kinds(isoflop: Run, project: Project) -> None:
    other = {"name": "truth", "budgets": [1e16, 1e17], "sizes": 5, "shapes": LARGE}
    _fill(project, {**other, "simulated": {"E": 0.5}})
    message = _bad(isoflop, "fit", project.local)
    assert "observations of 2 kinds" in message
    assert "trainer=simulated-1" in message


def test_two_families_of_shapes_are_refused(isoflop: Run, project: Project) -> None:
    deep = {"name": "deep", "budgets": [1e16, 1e17], "sizes": 5}
    _fill(project, {**deep, "shapes": {"depth": 3, "heads": 2, "width_multiple": 32}})
    assert "another family of shapes" in _bad(isoflop, "fit", project.local)


def test_an_unwritable_project_is_refused(isoflop: Run, tmp_path: Path, sweep_file) -> None:
    (tmp_path / "file").write_text("")
    message = _bad(isoflop, "run", sweep_file(), "--project", tmp_path / "file")
    assert "cannot write to the project" in message


def test_an_unwritable_output_is_refused(isoflop: Run, project: Project, tmp_path: Path) -> None:
    for verb in ("report", "propose"):
        assert "cannot write" in _bad(isoflop, verb, project.local, "-o", tmp_path / "no" / "file")


def test_an_empty_ledger_is_refused(isoflop: Run, tmp_path: Path) -> None:
    create_project(tmp_path / "p")
    assert "is empty" in _bad(isoflop, "fit", tmp_path / "p")


def test_no_project_is_refused(isoflop: Run, tmp_path: Path) -> None:
    for verb in ("fit", "status", "report", "ui"):
        assert "there is no project" in _bad(isoflop, verb, tmp_path / "none")


def test_one_budget_is_refused_by_name(isoflop: Run, tmp_path: Path) -> None:
    project = create_project(tmp_path / "p")
    _fill(project, {"name": "one", "budgets": [1e11], "sizes": 8, "span": 30.0})
    assert "one budget only" in _bad(isoflop, "fit", project.local)


def test_all_diverged_is_refused(isoflop: Run, tmp_path: Path) -> None:
    project = create_project(tmp_path / "p")
    _fill(project, {"name": "d", "budgets": [1e11], "sizes": 5, "simulated": {"diverge": 1.0}})
    assert "all of 5 observations diverged" in _bad(isoflop, "fit", project.local)


def test_two_kinds_are_listed_and_refused_unless_selected(isoflop: Run, project: Project) -> None:
    other = {"name": "other", "budgets": [1e16, 1e17], "sizes": 5, "recipe": "llama-adamw"}
    _fill(project, {**other, "shapes": LARGE})
    message = _bad(isoflop, "fit", project.local)
    assert "observations of 2 kinds" in message
    assert "15 with recipe=mini" in message
    assert "10 with recipe=llama-adamw" in message
    code, out, _ = isoflop("fit", project.local, "--where", "recipe=mini", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["observations"] == 15
    assert found["excluded"] == [{"reason": "not selected", "count": 10}]


@pytest.mark.parametrize(
    ("condition", "message"),
    [("recipe", "write COLUMN=VALUE"), ("x=1", "no column 'x'"), ("recipe=z", "there are mini")],
)
def test_a_bad_selection_is_named(
    isoflop: Run, project: Project, condition: str, message: str
) -> None:
    assert message in _bad(isoflop, "fit", project.local, "--where", condition)


def test_a_damaged_ledger_is_named_and_left_alone(isoflop: Run, project: Project) -> None:
    path = _files(project)[3]
    path.write_bytes(path.read_bytes()[:200])
    code, out, _ = isoflop("fit", project.local, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["observations"] == 14
    assert any(path.name in warning for warning in found["warnings"])
    assert path.stat().st_size == 200


def test_a_foreign_file_in_the_ledger_is_named(isoflop: Run, project: Project) -> None:
    pq.write_table(pa.table({"x": [1]}), project.local / "ledger" / "aaaa-1.parquet")
    code, out, _ = isoflop("fit", project.local, "--json")
    found = json.loads(out)
    assert (code, found["observations"]) == (0, 15)
    assert any("aaaa-1.parquet" in warning for warning in found["warnings"])


def test_a_spend_too_small_for_the_next_budget_is_refused(isoflop: Run, project: Project) -> None:
    message = _bad(isoflop, "propose", project.local, "--spend", "1e18")
    assert "allow at least" in message


def test_bad_numbers_are_refused(isoflop: Run, project: Project) -> None:
    assert "--flops is -1.0" in _bad(isoflop, "forecast", project.local, "--flops", "-1")
    assert "--spend: 'nan' is not a number" in _bad(
        isoflop, "propose", project.local, "--spend", "nan"
    )
    assert "--flops is 0.0" in _bad(isoflop, "propose", project.local, "--flops", "0")
    assert "level" in _bad(isoflop, "fit", project.local, "--level", "1.5")
    assert "--params is 'all'" in _bad(isoflop, "fit", project.local, "--params", "all")


def test_a_port_in_use_is_named(isoflop: Run, project: Project) -> None:
    (project.local / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = _bad(isoflop, "ui", project.local, "--port", port)
    assert f"port {port} on 127.0.0.1 cannot be used" in message
    assert "--port" in message


def test_a_report_is_one_self_contained_page(isoflop: Run, project: Project) -> None:
    from html.parser import HTMLParser

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.links: list[str] = []
            self.text: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

        def handle_data(self, data):
            self.text.append(data)

    code, out, _ = isoflop("report", project.local)
    assert code == 0
    page = Page()
    page.feed(Path(out.strip()).read_text())
    assert page.tags.count("svg") == 2
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    _, fitted, _ = isoflop("fit", project.local, "--json")
    text = " ".join(page.text)
    assert f"{json.loads(fitted)['exponents']['hoffmann']['a']:.3f}" in text
    assert project.storage.read("figures/isoflop.png").startswith(b"\x89PNG")
