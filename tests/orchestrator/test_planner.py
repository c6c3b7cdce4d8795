"""Plans: the trials of a spec, their cost, and the refusals."""

import json
import math
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.errors import InputError
from analysis.numerals import PF_DAY
from orchestrator.planner import Plan, make_plan
from orchestrator.spec import parse_spec, read_spec
from trainers.flops import flops_per_token, params, pass_sequences, trial_flops
from trainers.memory import fitting_passes
from trainers.passes import accumulate
from trainers.trial import Trial

ROOT = Path(__file__).parents[2]


def _plan(**changes: object) -> Plan:
    return make_plan(parse_spec({"name": "x", "budgets": [1e10], **changes}, source=Path("x.toml")))


def test_mini_is_28_trials_at_4_budgets_with_the_stated_widths() -> None:
    plan = make_plan(read_spec(ROOT / "examples/mini.toml"))
    grid = [p for p in plan.planned if p.role == "grid"]
    widths = {
        b: [p.trial.shape.width for p in grid if p.budget == b]
        for b in (4e10, 1.2e11, 3.6e11, 1.08e12)
    }
    assert len(grid) == 28
    assert len(plan.planned) == len(plan.trials) == 28 + 4  # probes of two sizes
    assert widths[4e10] == [12, 16, 20, 24, 32, 48, 64]
    assert widths[1.08e12] == [32, 40, 48, 64, 80, 96, 128]
    whole = 7 * (4e10 + 1.2e11 + 3.6e11 + 1.08e12) + 4 * 4e10
    assert plan.flops == pytest.approx(whole, rel=0.002)


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
    assert len(plan.trials) == 72 + 4
    budgets = sorted({p.budget for p in plan.planned})
    assert (budgets[0], budgets[-1]) == (1e16, 3e17)
    assert Counter(p.role for p in plan.planned) == {"grid": 36, "replicate": 36, "probe": 4}
    summary = plan.summary()
    assert summary["pf_days"] == pytest.approx(plan.flops / 8.64e19)
    assert PF_DAY == 8.64e19
    first = summary["trials"][0]
    assert set(first) == {
        "key", "params_non_embedding", "params_total", "width", "depth", "batch_tokens",
        "learning_rate", "seed", "horizons",
    }  # fmt: skip
    assert set(first["horizons"][0]) == {
        "tokens", "budget", "flops_exact", "flops_spent", "role",
    }  # fmt: skip


def test_no_trial_of_the_cluster_example_has_passes_of_two_sizes() -> None:
    """On an H100: its passes are as large as each other, and few sequences fill them up."""
    plan = make_plan(read_spec(ROOT / "examples/cluster.toml"))
    room, uneven, filled, trained = 0.9 * 80e9, 0, 0, 0
    for trial in plan.trials:
        h, shape = trial.hyperparameters, trial.shape
        share = h.batch_tokens // shape.context
        way = fitting_passes(shape, h, room, gpus=1, sharded=False)
        sizes = []

        def loss(windows: torch.Tensor, counted: int | None = None, sizes=sizes) -> torch.Tensor:
            sizes.append((len(windows), len(windows) if counted is None else counted))
            return torch.zeros((), requires_grad=True)

        accumulate(loss, torch.zeros(share, 1), way)
        assert len({size for size, _ in sizes}) == 1
        assert sum(counted for _, counted in sizes) == share  # exactly the tokens of its row
        assert len(sizes) == math.ceil(share / pass_sequences(shape.context))
        uneven += share % pass_sequences(shape.context) > 0 and len(sizes) > 1
        filled += (sum(size for size, _ in sizes) - share) * h.steps
        trained += share * h.steps
    assert uneven > 60  # as many had a last pass of another size
    assert filled < 0.04 * trained


def test_deterministic_kernels_make_no_other_trials() -> None:
    plain = {"name": "x", "budgets": [1e10], "sizes": 3}
    plans = [
        make_plan(parse_spec(plain | more, source=Path("x.toml")))
        for more in ({}, {"deterministic": True})
    ]
    keys, wanted = zip(
        *[([t.key for t in p.trials], {t.deterministic for t in p.trials}) for p in plans],
        strict=True,
    )
    assert keys[0] == keys[1]
    assert wanted == ({False}, {True})
    (first, *_) = plans[1].trials
    assert Trial.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    older = {name: value for name, value in first.to_dict().items() if name != "deterministic"}
    assert not Trial.from_dict(older).deterministic
    with pytest.raises(InputError, match="deterministic = true does nothing"):
        parse_spec(plain | {"trainer": "simulated", "deterministic": True}, source=Path("x.toml"))


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


@pytest.mark.parametrize(
    "corpus",
    [
        {"kind": "stdlib", "unique_tokens": 127},
        {"kind": "hugging_face", "dataset": "a/b", "tokens": 200_000, "unique_tokens": 127},
    ],
)
def test_a_corpus_without_one_window_a_pass_is_refused(corpus: dict) -> None:
    """Two contexts of 64: a pass begins anywhere in the first."""
    with pytest.raises(InputError, match=r"has 127 tokens to train on, .* takes at least 128, two"):
        _plan(corpus=corpus, epochs=1e9)
    enough = corpus | {"unique_tokens": 128}
    assert _plan(corpus=enough, epochs=1e9).planned


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


TRUNKS = {
    "budgets": [1e16, 2e16, 4e16, 8e16],
    "sizes": 5,
    "shapes": {"aspect": 64, "head_width": 32, "context": 1024, "width_multiple": 32},
    "recipe": {"name": "llama-adamw", "schedule": "wsd"},
    "trainer": "simulated",
}


@pytest.mark.parametrize(
    ("whole", "same"),
    [
        ({"name": "mini", "clip": 1}, {"name": "mini", "clip": 1.0}),
        ({"name": "llama-adamw", "rate_factor": 1}, "llama-adamw"),
        (
            {"name": "llama-adamw", "architecture": {"rotary_base": 5000}},
            {"name": "llama-adamw", "architecture": {"rotary_base": 5000.0}},
        ),
    ],
)
def test_a_constant_without_a_point_is_the_same_constant(whole: Any, same: Any) -> None:
    one, other = (_plan(budgets=[1e10], sizes=5, recipe=recipe) for recipe in (whole, same))
    assert [t.key for t in one.trials] == [t.key for t in other.trials]
    assert one.trials[0].recipe == other.trials[0].recipe


def test_what_is_planned_is_counted_as_what_it_is() -> None:
    """Probes, and horizons of trunks, are not trials of the grid."""
    assert _plan(**TRUNKS).counted == f"20 observations on {len(_plan(**TRUNKS).trials)} trunks"
    grid = {"budgets": [1e10], "sizes": 5}
    assert [_plan(**grid, probes=n).counted for n in (0, 2)] == [
        "5 trials",
        "5 trials and 4 probes",
    ]


def test_budgets_of_a_trunk_share_a_trial() -> None:
    plan = _plan(**TRUNKS)
    assert len(plan.planned) == len({p.id for p in plan.planned}) == 20
    assert len(plan.trials) < 10
    for p in plan.planned:
        assert p.tokens in p.trial.horizons
        half_a_step = 0.5 * p.trial.hyperparameters.batch_tokens / p.tokens
        exact = flops_per_token(p.trial.shape) * p.tokens
        assert exact == pytest.approx(p.budget, rel=half_a_step * 1.001)
    assert plan.flops == pytest.approx(sum(p.flops_spent for p in plan.planned), rel=1e-12)
    separately = sum(flops_per_token(p.trial.shape) * p.tokens for p in plan.planned)
    assert plan.flops < 0.75 * separately
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_further_budget_extends_the_trunks_that_are_there() -> None:
    fewer, more = _plan(**{**TRUNKS, "budgets": TRUNKS["budgets"][:3]}), _plan(**TRUNKS)
    keys = {trial.key for trial in more.trials}
    assert {trial.key for trial in fewer.trials} <= keys
    assert {p.id for p in fewer.planned} <= {p.id for p in more.planned}


def test_a_program_is_measured_at_its_end_alone_and_has_no_trunks() -> None:
    program = {
        "trainer": "command",
        "command": {"run": ["{python}", "-c", "0", "{width}", "{steps}"]},
    }
    with pytest.raises(InputError, match=r"schedule = \"wsd\" at every budget's horizon: leave"):
        _plan(**{**TRUNKS, **program})


def test_horizons_of_a_trunk_that_fall_together_are_refused() -> None:
    with pytest.raises(InputError, match="has one and the same horizon at both"):
        _plan(
            **{
                **TRUNKS,
                "budgets": [{"flops": f, "widths": [320, 352, 384]} for f in (1e16, 1.0001e16)],
            }
        )


def test_a_budget_within_the_warm_up_of_a_trunk_is_refused() -> None:
    with pytest.raises(InputError, match=r"width 512: horizon .* within the .* steps of warm-up"):
        _plan(**{**TRUNKS, "budgets": [{"flops": 3e14, "widths": [128, 160, 512]}]})


@pytest.mark.parametrize(
    ("exponent", "message"),
    [
        (1e6, "recipe llama-adamw at width .* matrix_rate is 0, but it should be finite and above"),
        (-1e6, "recipe llama-adamw at width .* gives no numbers .*: change its constants"),
    ],
)
def test_a_recipe_that_makes_nothing_to_train_with_is_named(exponent: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _plan(recipe={"name": "llama-adamw", "rate_exponent": exponent})
