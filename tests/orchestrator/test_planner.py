"""Plans: the trials of a spec, their cost, and the refusals."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import InputError
from orchestrator.planner import PF_DAY, Plan, make_plan
from orchestrator.spec import parse_spec, read_spec
from trainers.flops import params, trial_flops

ROOT = Path(__file__).parents[2]


def _plan(**changes: object) -> Plan:
    return make_plan(parse_spec({"name": "x", "budgets": [1e10], **changes}, source=Path("x.toml")))


def test_mini_is_28_trials_at_4_budgets_with_the_stated_widths() -> None:
    plan = make_plan(read_spec(ROOT / "examples/mini.toml"))
    widths = {
        b: [p.trial.shape.width for p in plan.planned if p.budget == b]
        for b in (4e10, 1.2e11, 3.6e11, 1.08e12)
    }
    assert len(plan.planned) == len(plan.trials) == 28
    assert widths[4e10] == [12, 16, 20, 24, 32, 48, 64]
    assert widths[1.08e12] == [32, 40, 48, 64, 80, 96, 128]
    assert plan.flops == pytest.approx(7 * (4e10 + 1.2e11 + 3.6e11 + 1.08e12), rel=0.002)


def test_every_trial_costs_its_budget_up_to_a_step() -> None:
    for p in make_plan(read_spec(ROOT / "examples/mini.toml")).planned:
        half_a_step = 0.5 / p.trial.hyperparameters.steps
        assert trial_flops(p.trial) == pytest.approx(p.budget, rel=half_a_step * 1.001)


def test_the_packaged_mini_sweep_is_the_example() -> None:
    packaged = ROOT / "orchestrator/mini.toml"
    assert packaged.read_text() == (ROOT / "examples/mini.toml").read_text()


def test_sizes_are_log_spaced_around_the_prior_optimum() -> None:
    plan = _plan(budgets=[1e12], sizes=5, span=16.0, tokens_per_param=10.0)
    n = np.array([params(p.trial.shape).non_embedding for p in plan.planned])
    d = np.array([p.trial.tokens for p in plan.planned])
    assert d[2] / n[2] == pytest.approx(10, rel=0.25)  # to the nearest width
    assert n[-1] / n[0] == pytest.approx(16, rel=0.3)
    np.testing.assert_allclose(np.diff(np.log(n)), np.log(16) / 4, rtol=0.35)


def test_cluster_example_is_planned_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("planning must not connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plan = make_plan(read_spec(ROOT / "examples/cluster.toml"))
    assert len(plan.trials) == 72
    budgets = sorted({p.budget for p in plan.planned})
    assert (budgets[0], budgets[-1]) == (1e16, 3e17)
    assert {p.role for p in plan.planned} == {"grid", "replicate"}
    summary = plan.summary()
    assert summary["pf_days"] == pytest.approx(plan.flops / 8.64e19)
    assert PF_DAY == 8.64e19
    first = summary["trials"][0]
    assert set(first) == {
        "key", "params_non_embedding", "params_total", "width", "depth", "batch_tokens",
        "learning_rate", "seed", "horizons",
    }  # fmt: skip
    assert set(first["horizons"][0]) == {"tokens", "budget", "flops_exact", "role"}


def test_replicates_are_the_other_seeds() -> None:
    plan = _plan(seeds=[5, 6])
    roles = {(p.trial.seed, p.role) for p in plan.planned}
    assert roles == {(5, "grid"), (6, "replicate")}


@pytest.mark.parametrize("example", ["mini", "simulated", "cluster"])
def test_a_plan_survives_json(example: str) -> None:
    plan = make_plan(read_spec(ROOT / f"examples/{example}.toml"))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan


def test_a_budget_too_small_for_a_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"budget 1e\+06 FLOPs buys width 4 only .* tokens"):
        _plan(budgets=[{"flops": 1e6, "widths": [4, 8, 12]}])


def test_an_optimum_outside_the_buildable_sizes_is_refused() -> None:
    with pytest.raises(InputError, match="lies outside the sizes that can be built"):
        _plan(budgets=[1e6])


def test_a_horizon_longer_than_the_corpus_says_how_many_epochs() -> None:
    small = {"kind": "markov", "tokens": 300_000}
    budgets = [{"flops": 4e10, "widths": [16, 24, 32]}]
    with pytest.raises(InputError, match=r"[12]\.\d\d epochs of corpus markov2-64 .*epochs = \d"):
        _plan(corpus=small, budgets=budgets)
    assert len(_plan(corpus=small, budgets=budgets, epochs=4.0).planned) == 3


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="width 26 is no multiple of 4"):
        _plan(budgets=[{"flops": 4e10, "widths": [16, 24, 26]}])


def test_the_corpus_is_checked_when_planning(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file matches"):
        _plan(corpus={"kind": "files", "glob": str(tmp_path / "*.none")})
    (tmp_path / "small.txt").write_text("small")
    with pytest.raises(InputError, match="to hold out a part"):
        _plan(corpus={"kind": "files", "glob": str(tmp_path / "*.txt")})
