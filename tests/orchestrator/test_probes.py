"""Probes beside a grid: which are planned, that no fit takes them, and where they are heard."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from analysis.errors import InputError
from analysis.report import page
from orchestrator.changes import changes
from orchestrator.planner import Plan, make_plan
from orchestrator.probes import cautions, probe_cost
from orchestrator.project import Project, create_project
from orchestrator.reading import Convention, Reading
from orchestrator.source import evidence, open_source
from orchestrator.spec import SweepSpec, parse_spec, to_toml
from trainers.flops import flops_per_token, params
from trainers.recipe import probed
from trainers.recipes import RECIPES, named
from trainers.trial import Measurement, Probe, Trial

BUDGETS = [
    {"flops": 4e10, "widths": [16, 24, 32, 48]},
    {"flops": 1.2e11, "widths": [16, 24, 32, 48]},
    {"flops": 3.6e11, "widths": [16, 24, 32, 48]},
]


def _spec(**changes: object) -> SweepSpec:
    return parse_spec({"name": "p", "budgets": BUDGETS, **changes}, source=Path("p.toml"))


def _plan(**changes: object) -> Plan:
    return make_plan(_spec(**changes))


def _probes(plan: Plan) -> list[Trial]:
    return [p.trial for p in plan.planned if p.role == "probe"]


def test_probes_are_trials_of_the_grid_at_half_and_double_the_rate() -> None:
    plan = _plan()
    found = _probes(plan)
    assert [t.shape.width for t in found] == [16, 16, 48, 48]
    for trial in found:
        (grid,) = [
            p.trial for p in plan.planned
            if p.role == "grid" and p.budget == 4e10 and p.trial.shape == trial.shape
        ]  # fmt: skip
        assert trial.probe is not None
        h, usual, factor = trial.hyperparameters, grid.hyperparameters, trial.probe.rate
        for name in ("matrix_rate", "embedding_rate", "head_rate"):
            assert getattr(h, name) == factor * getattr(usual, name)
        for name in ("steps", "batch_tokens", "warmup_steps", "clip"):
            assert getattr(h, name) == getattr(usual, name)
        assert (trial.tokens, trial.seed) == (grid.tokens, grid.seed)
        assert trial.key != grid.key
    assert [t.probe.rate for t in found if t.probe] == [0.5, 2.0, 0.5, 2.0]


def test_their_share_of_the_flops_is_told() -> None:
    """4 of 4e10 beside 4 of each of 4e10, 1.2e11 and 3.6e11."""
    cost = probe_cost(_plan())
    assert (cost.trials, cost.widths, cost.budget) == (4, (16, 48), 4e10)
    assert cost.share == pytest.approx(16 / (16 + 16 + 48 + 144), rel=0.01)


@pytest.mark.parametrize(
    ("given", "widths"),
    [
        ({"probes": 0}, []),
        ({"probes": 1}, [16]),
        ({"probes": 3}, [16, 32, 48]),  # the middle of four is either
        ({"probes": 9}, [16, 24, 32, 48]),
        ({"budgets": BUDGETS[:2]}, []),  # 2 of 4e10 would be 8 of 72
        ({"budgets": BUDGETS[:1]}, []),
        ({"budgets": BUDGETS[:1], "probes": 2}, [16, 48]),
        ({"trainer": "simulated"}, []),
    ],
)
def test_a_sweep_has_those_that_it_asks_for_or_can_afford(
    given: dict[str, object], widths: list[int]
) -> None:
    assert list(dict.fromkeys(t.shape.width for t in _probes(_plan(**given)))) == widths


def test_one_size_is_probed_where_two_cost_too_much() -> None:
    budgets = [*BUDGETS[:2], {"flops": 1.5e11, "widths": [16, 24, 32, 48]}]
    cost = probe_cost(_plan(budgets=budgets))
    assert cost.widths == (16,)
    assert cost.share == pytest.approx(8 / (8 + 16 + 48 + 60), rel=0.01)


def test_probes_of_what_ignores_the_rate_are_refused() -> None:
    with pytest.raises(InputError, match=r"probes = 1 would show nothing: trainer = .simulated"):
        _plan(trainer="simulated", probes=1)
    command = {
        "trainer": "command",
        "command": {"run": ["python", "x", "{width}", "{tokens}"]},
        "corpus": {"kind": "declared", "name": "x", "version": "1", "vocabulary": 9,
                   "tokens": 10**12},
    }  # fmt: skip
    assert not _probes(_plan(**command))
    with pytest.raises(InputError, match=r"its command is told no \{learning_rate\}; set probes"):
        _plan(**command, probes=1)
    command["command"] = {"run": ["python", "x", "{width}", "{tokens}", "--lr={learning_rate}"]}
    assert len(_probes(_plan(**command))) == 4


def test_a_probe_of_a_trunk_is_one_of_its_branches() -> None:
    trunk = {"name": "llama-adamw", "schedule": "wsd"}
    plan = _plan(recipe=trunk, tokens_per_param=20, probes=1)
    lowest = min((p for p in plan.planned if p.role == "grid"), key=lambda p: (p.budget, p.tokens))
    for trial in _probes(plan):
        assert len(lowest.trial.horizons) == 3
        assert len(trial.horizons) == 1
        assert trial.horizons[0] in lowest.trial.horizons or trial.shape != lowest.trial.shape
        assert trial.hyperparameters.steps == next(
            p.trial.hyperparameters.steps for p in plan.planned if p.trial.shape == trial.shape
        )


def test_another_batch_leaves_tokens_and_warm_up_as_they_are() -> None:
    trial = _plan(recipe="llama-adamw", probes=0).trials[0]
    h = trial.hyperparameters
    other = probed(trial, Probe(batch=2.0), RECIPES["llama-adamw"]).hyperparameters
    assert other.batch_tokens == 2 * h.batch_tokens
    assert other.steps * other.batch_tokens == pytest.approx(trial.tokens, abs=2 * h.batch_tokens)
    assert other.warmup_steps == pytest.approx(h.warmup_steps / 2, abs=1)


def test_a_probe_has_the_beta2_that_its_recipe_has_at_its_batch() -> None:
    """Porian et al.: 0.95 from a threshold on, here twice the batch, else 0.99."""
    trial = _plan(recipe="llama-adamw", probes=0).trials[0]
    batch = trial.hyperparameters.batch_tokens
    recipe = named("llama-adamw", {"large_batch_tokens": 2 * batch})
    betas = [
        probed(trial, Probe(batch=factor), recipe).hyperparameters.beta2
        for factor in (0.5, 1.0, 2.0, 4.0)
    ]
    assert betas == [0.99, 0.99, 0.95, 0.95]


def test_a_grid_at_the_probes_rate_is_not_the_probe() -> None:
    """Or the row of one recipe would stand for another's."""
    doubled = _plan(recipe={"name": "mini", "rate_factor": 2 * 1.05}, probes=0)
    keys = {trial.key for trial in doubled.trials}
    assert not keys & {trial.key for trial in _probes(_plan())}


def test_a_plan_with_probes_is_kept_and_may_lose_them() -> None:
    plan = _plan()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert to_toml(_spec(probes=0), "x").count("probes = 0") == 1
    assert changes(plan, _plan(probes=0)).gone == ()
    assert len(changes(_plan(probes=0), plan).new) == 4


def _measured(trial: Trial, tokens: int, loss: float) -> Measurement:
    return Measurement(
        tokens=tokens,
        status="complete",
        reason=None,
        loss=loss,
        loss_stderr=0.01,
        bits_per_byte=None,
        seconds=1.0,
        mfu=None,
        device="cpu",
        curve=(),
        versions={},
        flops=flops_per_token(trial.shape) * tokens,
    )


def _loss(trial: Trial) -> float:
    n = params(trial.shape).non_embedding
    return 1.0 + (n / 20.0) ** -0.4 + (trial.tokens / 20.0) ** -0.3 + 0.002 * math.sin(n)


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., Project]:
    """Makes a project with rows of a law, and probes so much better than their trials."""

    def make(gain: float = 0.0) -> Project:
        project, plan = create_project(tmp_path / "project"), _plan()
        project.save_plan(plan)
        for p in plan.planned:
            better = gain if p.trial.probe and p.trial.probe.rate == 0.5 else -0.05
            loss = _loss(p.trial) - (better if p.role == "probe" else 0.0)
            project.ledger.write(p.trial, _measured(p.trial, p.tokens, loss))
        return project

    return make


def test_no_fit_takes_them(filled: Callable[..., Project], tmp_path: Path) -> None:
    """Nor where only the rows are known, without any plan."""
    project = filled(gain=0.1)
    found = evidence(project)
    assert found.table.num_rows == 12
    assert list(found.excluded.values()) == [4]
    pq.write_table(project.ledger.read(), tmp_path / "rows.parquet")
    alone = open_source(str(tmp_path / "rows.parquet"), Reading())
    assert alone.table is not None
    assert alone.table.num_rows == 12
    assert [rung.width for rung in alone.rungs] == [16, 48]
    asked = Reading(roles=("grid", "probe"))
    assert evidence(project, asked).table.num_rows == 16


def test_an_undertuned_rung_is_told_wherever_somebody_looks(
    filled: Callable[..., Project], isoflop, tmp_path: Path
) -> None:
    project = filled(gain=0.1)
    said = "the rung at width 16 is undertuned: half the rate gives"
    for verb in ("fit", "status", "forecast"):
        more = ("--flops", "1e12") if verb == "forecast" else ()
        code, out, err = isoflop(verb, project.uri, *more)
        assert (code, err) == (0, "")
        assert said in out, verb
    drawn = {"isoflop": Figure(), "scaling": Figure()}
    study = evidence(project).study(Convention())
    report = page(study, drawn, table=None, name="p", proposal=None)
    assert said in report
    assert "Do the learning rates hold?" in report
    told = json.loads(isoflop("fit", project.uri, "--json")[1])
    assert any(warning.startswith(said) for warning in told["warnings"])
    assert [rung["undertuned"] for rung in told["rungs"]] == [True, True]
    assert told["observations"] == 12
    assert len(json.loads(isoflop("status", project.uri, "--json")[1])["rungs"]) == 2


def test_what_is_ruled_out_says_nothing_of_rates_anywhere(
    filled: Callable[..., Project], isoflop
) -> None:
    project = filled(gain=0.1)
    better = "[[exclude]]\nprobe_rate = 0.5\nreason = 'another text by mistake'\n"
    project.storage.replace("exclude.toml", better.encode())
    for verb in ("fit", "status"):
        out = isoflop(verb, project.uri)[1]
        assert "undertuned" not in out
        assert "rates hold: double the rate is no better at widths 16 and 48" in out


def test_rates_that_hold_are_told_too(filled: Callable[..., Project], isoflop) -> None:
    project = filled()
    for verb in ("fit", "status"):
        out = isoflop(verb, project.uri)[1]
        assert "rates hold: half and double the rate is no better at widths 16 and 48" in out
        assert "undertuned" not in out


def test_a_recipe_outside_of_its_range_is_told_once_a_reason(isoflop, tmp_path: Path) -> None:
    """N of 2 x 12 x width^2 up to 55k, where Porian et al. begin at 5e6."""
    plan = _plan(recipe="llama-adamw", tokens_per_param=20, probes=0)
    (caution,) = cautions(plan)
    assert (caution.trials, caution.of) == (12, 12)
    assert not cautions(_plan(trainer="simulated", recipe="llama-adamw"))
    path = tmp_path / "sweep.toml"
    path.write_text(to_toml(plan.spec, "a sweep"))
    out = isoflop("plan", path)[1]
    assert out.count("! recipe: Porian et al. fitted at N 5e+06 to 9e+08; 12 of 12 trials are") == 1
    told = json.loads(isoflop("plan", path, "--json")[1])
    assert told["cautions"] == [
        {
            "about": "recipe",
            "reason": "Porian et al. fitted at N 5e+06 to 9e+08",
            "trials": 12,
        }
    ]
    assert told["probes"]["trials"] == 0


def test_mini_is_within_the_range_of_its_recipe() -> None:
    assert cautions(_plan()) == []
