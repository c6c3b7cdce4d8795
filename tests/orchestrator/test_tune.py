"""Tuning a recipe: by a program whose best rate and batch are known laws, and by real training."""

import itertools
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.errors import InputError
from orchestrator.planner import make_plan
from orchestrator.project import open_project
from orchestrator.source import evidence
from orchestrator.spec import SweepSpec, parse_spec, read_spec
from orchestrator.tune_design import BLOCK, Model, models, next_points, planned
from orchestrator.tune_laws import TunedModel, fitted, further_points, tuned_recipe
from trainers.flops import params, trial_flops
from trainers.recipes import named
from trainers.trial import Probe
from trainers.tuned import rules

RATE, RATE_EXPONENT = 0.9, -0.4
BATCH, BATCH_EXPONENT = 3.0, 0.6
"""The truth: best rate 0.9 N^-0.4 and best batch 3 N^0.6 tokens, N with the head of 256 symbols as
`llama-adamw` has it; a tilted valley around them."""
PROGRAM = f"""
    import json, math, sys
    tokens, rate, batch, width = map(float, sys.argv[1:])
    n = tokens / 20 + 256 * width
    x = math.log(rate / ({RATE} * n**{RATE_EXPONENT}))
    y = math.log(batch / ({BATCH} * n**{BATCH_EXPONENT}))
    loss = 2 + 50 * n**-0.5 + 0.05 * x * x + 0.03 * y * y + 0.02 * x * y
    print(json.dumps({{"loss": loss, "tokens": int(tokens)}}), flush=True)
"""
RECIPE = {"name": "llama-adamw", "rate_factor": 0.25}  # near the truth, where 9 probes do


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep of that program beside it."""

    def write(**changes: object) -> Path:
        (tmp_path / "truth.py").write_text(textwrap.dedent(PROGRAM))
        told = ["{tokens}", "{learning_rate}", "{batch_tokens}", "{width}"]
        asked = {
            "name": "t",
            "trainer": "command",
            "budgets": [1e12, 1e13],
            "sizes": 5,
            "recipe": RECIPE,
            "command": {"run": ["{python}", "-S", "truth.py", *told], "files": ["truth.py"]},
            "corpus": {"kind": "declared", "name": "none", "version": "1", "vocabulary": 256,
                       "tokens": 9_000_000_000},
            "shapes": {"depth": 2, "heads": 2, "context": 16},
            **changes,
        }  # fmt: skip
        path = tmp_path / "sweep.toml"
        path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in asked.items()))
        return path

    return write


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_laws_of_a_program_are_found_and_make_the_next_sweep(
    isoflop, sweep: Callable[..., Path], tmp_path: Path
) -> None:
    path, project = sweep(), tmp_path / "project"
    command = ("tune", path, "--project", project, "--sizes", 2, "--json")
    code, out, err = isoflop(*command)
    assert code == 0, err
    told = json.loads(out)
    assert told["probes"] == told["measured"] == told["trained"] == 18
    assert json.loads(isoflop("sync", project, "--json")[1])["written"] == 0  # in MLflow already
    assert told["warnings"] == []
    for name, exponent in (("rate", RATE_EXPONENT), ("batch", BATCH_EXPONENT)):
        found = told["laws"][name]["exponents"]["N+head"]
        assert found["estimate"] == pytest.approx(exponent, abs=0.01)
        assert found["interval"][0] < exponent < found["interval"][1]
    tuned = read_spec(tmp_path / "sweep-tuned.toml")
    assert (tuned.name, tuned.budgets) == ("t-tuned", read_spec(path).budgets)
    for trial in make_plan(tuned).trials[:5]:
        n, h = params(trial.shape).matmul, trial.hyperparameters
        assert h.matrix_rate == pytest.approx(RATE * n**RATE_EXPONENT, rel=0.02)
        # Whole sequences of 16 tokens.
        assert h.batch_tokens == pytest.approx(BATCH * n**BATCH_EXPONENT, rel=0.02, abs=8)

    for file in sorted((project / "ledger").iterdir())[:4]:
        file.unlink()
    (tmp_path / "sweep-tuned.toml").write_text("# mine")
    again = json.loads(isoflop(*command)[1])
    assert again["trained"] == 4
    assert again["recipe"] == told["recipe"]
    assert again["warnings"] == [f"{tmp_path}/sweep-tuned.toml was another, and was replaced"]
    assert json.loads(isoflop(*command)[1])["warnings"] == []
    with pytest.raises(InputError, match="all 18 observations are left out: probes"):
        evidence(open_project(project))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_probes_that_tell_no_recipe_are_shown_all_the_same(
    isoflop, sweep: Callable[..., Path], tmp_path: Path
) -> None:
    """All best rates lie 40 times further down, where no probe came."""
    path = sweep(recipe={**RECIPE, "rate_factor": 10.0})
    command = ("tune", path, "--project", tmp_path / "p", "--sizes", 2, "--trials")
    assert isoflop(*command, 12)[0] == 2
    code, out, err = isoflop(*command, 9)
    assert code == 2
    (plan,) = json.loads(isoflop("status", tmp_path / "p", "--json")[1])["plans"]
    assert (plan["name"], plan["complete"], plan["waiting"]) == ("t-tune", 24, 0)  # of both
    assert "Best rate and batch of t" in out
    assert out.count("≤ ") == 4  # two rates, and the batches at these
    assert "isoflop: no law of the rate: 0 of 2 models have their best value within" in err
    assert not (tmp_path / "sweep-tuned.toml").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_real_training_is_tuned_to_a_recipe_that_runs(isoflop, tmp_path: Path) -> None:
    """Tiny models, with probes enough to surround the best rate on any Python's own text."""
    path = tmp_path / "real.toml"
    path.write_text(
        'name = "real"\n'
        'recipe = { name = "llama-adamw", precision = "fp32", rate_factor = 0.25, '
        "batch_factor = 0.36 }\n"
        "budgets = [{ flops = 3e8, widths = [4, 8, 12] }, { flops = 1e9, widths = [4, 8, 12] }]\n"
        "shapes = { depth = 1, heads = 1, context = 32 }\n"
    )
    command = ("tune", path, "--project", tmp_path / "p", "--sizes", 2, "--trials", 16)
    code, out, err = isoflop(*command, "--tokens-per-param", 40)
    assert code == 0, err
    assert "Laws through the optima" in out
    made = tomllib.loads((tmp_path / "real-tuned.toml").read_text())["recipe"]
    assert "rate_factor" not in made
    trials = make_plan(read_spec(tmp_path / "real-tuned.toml")).trials
    assert all(0 < trial.hyperparameters.matrix_rate < 1 for trial in trials)


def _spec() -> SweepSpec:
    return parse_spec(
        {"name": "x", "recipe": "llama-adamw", "budgets": [1e12, 4e12], "sizes": 5,
         "epochs": 100, "shapes": {"depth": 2, "heads": 2, "context": 16}}, source=Path("x.toml")
    )  # fmt: skip


def _models(**changes: object) -> list[Model]:
    asked = {"sizes": 3, "ratios": (20.0,), "trials": 18, "spend": None, **changes}
    return models(_spec(), make_plan(_spec()), **asked)


def _best_rate(model: Model) -> float:
    """At four times the recipe's batch, which is the best one."""
    return 0.5 * params(model.shape).matmul ** -0.4


def _probed(model: Model, rates: list[int], batches: list[int], far: float = 1.0) -> TunedModel:
    """A tilted valley, its best rate so many times further up, exactly."""
    losses = {}
    for point in itertools.product(rates, batches):
        if trial := model.trial(point):
            h, usual = trial.hyperparameters, model.base.hyperparameters
            x = math.log(h.matrix_rate / (far * _best_rate(model)))
            y = math.log(h.batch_tokens / (4 * usual.batch_tokens))
            losses[point] = 2 + 0.05 * x * x + 0.03 * y * y - 0.04 * x * y
    return fitted(model, losses, 0.9)


WIDE = [-6, -5, -4, -3, -2]
"""Octaves of rate that hold the best ones of `_models`."""


def test_where_the_batch_keeps_its_rule_rates_are_the_best_at_that_batch() -> None:
    """Along the valley, at a fourth of the best batch, it is 4^-0.4 of the best rate."""
    small, *others = _models()
    found = [_probed(small, WIDE, [0]), *(_probed(m, WIDE, [-1, 0, 1, 2, 3]) for m in others)]
    made = tuned_recipe(_spec(), found, 0.9)
    assert made.batch is None
    (note,) = made.notes
    assert "no other batch could be probed: the batch's rule is left as it was" in note
    whole = tuned_recipe(_spec(), [_probed(m, WIDE, [-1, 0, 1, 2, 3]) for m in _models()], 0.9)
    assert whole.batch is not None
    for model in others:
        h, usual = (
            r.rules.resolve(model.shape, model.base.tokens) for r in (made.recipe, _spec().recipe)
        )
        assert h.batch_tokens == usual.batch_tokens
        assert h.matrix_rate == pytest.approx(4**-0.4 * _best_rate(model), rel=0.02)
        free = whole.recipe.rules.resolve(model.shape, model.base.tokens)
        assert free.matrix_rate == pytest.approx(_best_rate(model), rel=0.02)
        assert free.batch_tokens == pytest.approx(4 * usual.batch_tokens, rel=0.02)


def test_a_bound_of_the_batch_is_no_law_of_it() -> None:
    found = [_probed(m, WIDE, [-1, 0, 1]) for m in _models()]
    assert {item.bowl.batch.place for item in found} == {"above"}
    made = tuned_recipe(_spec(), found, 0.9)
    assert made.batch is None
    assert "reference_batch_tokens" not in (made.recipe.model_extra or {})
    *edges, note = made.notes
    assert len(edges) == 3
    assert "the best batch is the highest that was probed, a bound that no law takes" in edges[0]
    assert note.startswith("no law of the batch: 0 of 3 models have their best value within what")
    assert "probe higher ones; the batch's rule is left as it was" in note


def test_too_few_best_rates_leave_the_recipes_exponent_and_none_is_no_recipe() -> None:
    """The largest model's are beyond what was probed, then the middle one's too, then all."""
    small, middle, large = _models()
    near, far = (_probed(middle, WIDE, [1, 2, 3], times) for times in (1.0, 40.0))
    least, beyond = (_probed(small, WIDE, [1, 2, 3], times) for times in (1.0, 40.0))
    end = _probed(large, WIDE, [1, 2, 3], 40.0)
    found = tuned_recipe(_spec(), [least, near, end], 0.9)
    assert found.rate.exponents["N+head"].estimate == pytest.approx(-0.4)
    one = tuned_recipe(_spec(), [least, far, end], 0.9)
    assert one.rate.exponents["N+head"].estimate == pytest.approx(-1 / 3)
    assert one.rate.at_centre.estimate == pytest.approx(_best_rate(small), rel=0.02)
    assert any(
        re.search(r"the rate has the recipe's own exponents: 1 of 3 .* probe higher ones", note)
        for note in one.notes
    )
    with pytest.raises(InputError, match=r"no law of the rate: 0 of 3 .* probe higher ones; rai"):
        tuned_recipe(_spec(), [beyond, far, end], 0.9)


def test_an_exponent_that_probes_do_not_tell_is_the_recipes() -> None:
    """Two models of about one size, with best rates a tenth off their law in opposite ways."""
    small, middle, _ = _models()
    found = [_probed(m, WIDE, [1, 2, 3], t) for m, t in ((small, 1.1), (middle, 0.9))]
    bowls = [replace(m.bowl, rate=replace(m.bowl.rate, log_stderr=0.5)) for m in found]
    made = tuned_recipe(
        _spec(), [replace(m, bowl=b) for m, b in zip(found, bowls, strict=True)], 0.9
    )
    assert made.rate.exponents["N+head"].estimate == pytest.approx(-1 / 3)
    sizes = [params(m.model.shape).matmul for m in found]
    best = [_best_rate(small) * 1.1, _best_rate(middle) * 0.9]
    for_one = [r * (n / sizes[0]) ** (1 / 3) for n, r in zip(sizes, best, strict=True)]
    mean = math.sqrt(math.prod(for_one))  # of both, carried to the size of the first
    assert made.rate.at(**{"N+head": sizes[0]}) == pytest.approx(mean, rel=0.02)
    assert "the rate's exponent of N+head is the recipe's own, -0.333: by the probes" in " ".join(
        made.notes
    )


def test_probing_follows_the_best_point_until_it_is_surrounded() -> None:
    """A valley whose lowest lattice point is two octaves up in rate and one down in batch."""
    (model, *_), known = _models(), {}
    rounds = 0
    while new := next_points(model, known, 30):
        known |= {(i, j): (i - 2.2) ** 2 + 0.5 * (j + 0.8) ** 2 for i, j in new}
        rounds += 1
    best = min(known, key=lambda point: known[point])
    assert best == (2, -1)
    assert {(best[0] + i, best[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} <= set(known)
    assert (rounds, len(known)) == (3, 17)
    assert len(next_points(model, {(0, 0): 1.0}, 4)) == 3  # no more than was allowed


def test_probing_follows_the_optimum_past_an_edge() -> None:
    """A valley so narrow and tilted that on the lattice its floor is met at every other octave."""

    def loss(i: int, j: int) -> float:
        return 2 + 0.05 * (j - 2 * i) ** 2 + 0.001 * (i - 1.6) ** 2

    model, known = _models()[-1], {}
    while new := next_points(model, known, 30):
        known |= {point: loss(*point) for point in new}
    assert len(known) == 9  # the recipe's own is the best of the nine
    assert fitted(model, known, 0.9).bowl.batch.place == "above"
    while new := further_points(model, known, 30, 0.9):
        known |= {point: loss(*point) for point in new}
    found = fitted(model, known, 0.9)
    assert found.edges == []
    usual = model.base.hyperparameters
    assert found.bowl.rate.value.estimate == pytest.approx(2**1.6 * usual.matrix_rate, rel=0.02)
    assert found.bowl.batch.value.estimate == pytest.approx(2**3.2 * usual.batch_tokens, rel=0.02)
    assert len(further_points(model, {p: loss(*p) for p in BLOCK}, 10, 0.9)) == 1


def test_where_all_diverge_the_rate_goes_down() -> None:
    (model, *_), nine = _models(), {(i, j): math.inf for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert min(next_points(model, nine, 18)) == (-2, -2)


def test_a_batch_below_a_sequence_is_not_probed() -> None:
    (model, *_) = _models()
    context, batch = 16, model.base.hyperparameters.batch_tokens
    lowest = -math.floor(math.log2(batch / context))
    assert model.trial((0, lowest)) is not None
    assert model.trial((0, lowest - 1)) is None


def test_sizes_are_the_sweeps_and_cost_what_was_allowed() -> None:
    chosen = _models(ratios=(10.0, 40.0))
    ratios = [m.base.tokens / params(m.shape).non_embedding for m in chosen]
    assert ratios == pytest.approx([10.0, 40.0] * 3, rel=0.02)
    for spend in (2e13, 1e14):
        cost = sum(18 * trial_flops(m.base) for m in _models(spend=spend))
        assert 0.3 * spend < cost <= spend
    with pytest.raises(InputError, match=r"--spend 1e\+09: 18 probes of each of the smallest 3"):
        _models(spend=1e9)
    with pytest.raises(InputError, match=r"of the sweep's 7 sizes .* and 9 are to be tuned"):
        _models(sizes=9)


def test_what_is_planned_are_probes() -> None:
    chosen = _models()[:1]
    spec = parse_spec({"name": "x", "budgets": [1e10]}, source=Path("x.toml"))
    plan = planned("x-tune", spec, chosen, [[(0, 0), (1, -1)]])
    assert [(p.role, p.trial.probe) for p in plan.planned] == [
        ("probe", Probe()),
        ("probe", Probe(rate=2.0, batch=0.5)),
    ]
    assert {p.budget for p in plan.planned} == {trial_flops(chosen[0].base)}


@pytest.mark.parametrize("name", ["mini", "mini-adamw", "mup", "muon"])
def test_a_recipe_whose_rules_are_no_power_law_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=f"recipe '{name}' cannot take .*; llama-adamw, step-law and deepseek can"
    ):
        rules(name, named(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", 1), "--sizes is 1: a law goes through 2 at least"),
        (("--trials", 5), "--trials is 5: around a recipe's rate and batch lie 9"),
        (("--tokens-per-param", -3), "--tokens-per-param is -3; it must be finite and above 0"),
        (("--spend", 0), "--spend is 0.0; it must be a positive number of FLOPs"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    arguments: tuple, message: str, isoflop, sweep: Callable[..., Path]
) -> None:
    code, _, err = isoflop("tune", sweep(), *arguments)
    assert code == 2
    assert err.startswith(f"isoflop: {message}")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"name": "n" * 75}, (), "the sweep that tuning would write could not be run: .* name is"),
        ({}, ("--output", "sweep.toml"), "--output sweep.toml is the sweep that is to be tuned"),
    ],
)
def test_what_could_not_be_written_is_refused_before_any_probe(
    isoflop, sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict, arguments: tuple, message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sweep(**changes).read_text()
    code, _, err = isoflop("tune", tmp_path / "sweep.toml", *arguments, "--project", "p")
    assert code == 2
    assert re.match(f"isoflop: {message}", err)
    assert not [*tmp_path.glob("p/plans/*"), *tmp_path.glob("*-tuned.toml")]
    assert (tmp_path / "sweep.toml").read_text() == before


def test_a_program_that_is_not_told_the_batch_is_refused(
    isoflop, sweep: Callable[..., Path], tmp_path: Path
) -> None:
    path = sweep(command={"run": ["{python}", "-c", "0", "{learning_rate}", "{width}{steps}"]})
    code, _, err = isoflop("tune", path, "--project", tmp_path / "p")
    assert code == 2
    assert "t cannot be tuned: its command is told no {batch_tokens} or {sequences}" in err
