"""What a plan takes on a cluster."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cluster.machines import Cluster, Node, uniform
from cluster.pace import Pace
from orchestrator.estimate import Estimate, estimate, measured_pace
from orchestrator.planner import make_plan
from orchestrator.project import create_project
from orchestrator.spec import parse_spec, read_spec
from trainers.flops import params
from trainers.trial import Measurement, Trial

ROOT = Path(__file__).parents[2]
LARGE = {"aspect": 64.0, "head_width": 32, "context": 1024, "width_multiple": 32}


def _simulated(**changes: object) -> Estimate:
    spec = {
        "name": "s", "trainer": "simulated", "recipe": "llama-adamw", "budgets": [1e17, 1e18],
        "sizes": 5, "shapes": LARGE, "simulated": {"seconds": 3600.0, "gpus": 2.0},
        "cluster": {"gpu": "H100", "gpus_per_node": 4, "price_per_gpu_hour": 2.5},
    }  # fmt: skip
    return estimate(make_plan(parse_spec({**spec, **changes}, source=Path("s.toml"))))


def test_ten_hours_of_two_gpus_each() -> None:
    """10 trials, two at a time on four GPUs: five hours and what it takes to start."""
    found = _simulated()
    assert found.cost.gpu_hours == pytest.approx(20)
    assert found.cost.money == pytest.approx(50)
    assert found.schedule.makespan == pytest.approx(5 * 3600, rel=1e-3)
    assert found.schedule.idle == pytest.approx(0, abs=1e-3)
    assert found.cost.checkpoint_bytes == 0


@pytest.mark.parametrize(
    ("limits", "held"),
    [
        ({"gpu_hours": 12.5}, {"gpu_hours": 4}),
        ({"money": 12.5}, {"money": 8}),
        ({"flops": 5.1e17}, {"flops": 5}),
        ({"deadline": 2.5}, {"deadline": 6}),
        ({"slots": 1}, {}),
    ],
)
def test_what_the_caps_would_hold_back(limits: dict, held: dict[str, int]) -> None:
    found = _simulated(limits=limits).to_json()
    assert Counter(found["held_back"].values()) == held
    caps = {t["key"]: t["placement"]["held_back"] for t in found["trials"]}
    assert {key: cap for key, cap in caps.items() if cap} == found["held_back"]
    # Of 10 trials of two GPU-hours, at 2.5 each.
    started = 10 - sum(held.values())
    assert (found["gpu_hours"], found["money"]) == pytest.approx((2 * started, 5 * started))
    whole = found["without_limits"]
    assert (whole["gpu_hours"], whole["money"]) == pytest.approx((20, 50))


HUNDREDS = {
    "name": "large",
    "recipe": "llama-adamw",
    "budgets": [1e17, 1.7e17, 2.8e17, 4.6e17, 7.7e17, 1.3e18, 2.2e18, 3.6e18, 6e18, 1e19],
    "sizes": 11,
    "span": 12,
    "seeds": [0, 1, 2],
    "corpus": {"kind": "hugging_face", "dataset": "some/text", "tokens": 40_000_000_000},
    "shapes": {"aspect": 64, "head_width": 32, "context": 1024, "width_multiple": 32},
    "cluster": {"gpu": "H100", "gpus_per_node": 8, "nodes": 8},
}
"""330 trials, of which the largest takes more than half of a GPU's memory."""


def test_a_large_sweep_fits_on_its_cluster() -> None:
    """A pass of 16 sequences is trained at once, in bf16, on one GPU."""
    found = estimate(make_plan(parse_spec(HUNDREDS, source=Path("large.toml"))))
    assert 'hf:some/text is known by what is declared of it, and revision = "main" may' in str(
        found.to_json()["corpus_caution"]
    )
    assert found.asked
    assert not found.unplaceable
    assert {item.placement.label for item in found.placed.values()} == {"1 GPU"}
    shapes = [item.trial.shape for item in found.placed.values()]
    most = max(shapes, key=lambda shape: params(shape).total)
    # At each block 10 + 4 x 8/3 numbers a unit; 22 bytes a parameter: weights, twice gradients and
    # two moments in fp32, weights in bf16; 0.8 GB of CUDA's.
    kept = 2 * 16 * 1024 * most.depth * (10 + 4 * 8 / 3) * most.width
    assert 0.6 * 80e9 < kept + 22 * params(most).total + 0.8e9 < 0.7 * 80e9
    # 8.2e20 FLOPs at 20% to 40% of 989 TFLOP/s
    assert 8.2e20 / (0.4 * 989e12) / 3600 < found.cost.gpu_hours < 8.2e20 / (0.2 * 989e12) / 3600
    trials = [item for item in found.placed.values() if item.seconds >= 300]
    # By default two checkpoints, each of weights and two moments in fp32.
    expected = 2 * 3 * 4 * sum(params(item.trial.shape).total for item in trials)
    assert found.cost.checkpoint_bytes == pytest.approx(expected)


def test_json_has_every_trials_placement_beside_the_plan() -> None:
    found = _simulated()
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data | found.plan.summary() != data  # rows have more than the plan's own
    assert data["classes"] == {"2 GPUs": 10}
    assert data["cluster"]["gpus"] == 4
    assert data["precision"] == "bf16"
    row = data["trials"][0]
    assert row["placement"]["class"] == "2 GPUs"
    assert row["placement"]["seconds"] == 3600
    assert row["unplaceable"] is None


def test_what_does_not_fit_is_in_the_json_by_name() -> None:
    wide = _simulated(simulated={"seconds": 1.0, "gpus": 8.0}).to_json()
    assert len(wide["unplaceable"]) == 10
    assert wide["unplaceable"][0].endswith("needs 8 GPUs, and there are 4")
    assert wide["trials"][0]["placement"] is None
    assert wide["makespan_seconds"] == 0


def test_without_a_cluster_it_is_this_machines_cores() -> None:
    plan = make_plan(read_spec(ROOT / "examples/mini.toml"))
    found = estimate(plan)
    assert not found.asked
    assert (found.cluster.gpus, found.cost.gpu_hours, found.cost.money) == (0, 0, None)
    assert found.cost.core_hours * 3600 == pytest.approx(416, rel=0.1)  # as measured
    two = estimate(plan, uniform(cpus=2))
    # 224 to 231 s on two cores, Ray's start included; 7% of it is the fit's error for this sweep.
    assert 190 < two.schedule.makespan < 231
    tiny = Cluster(nodes=(Node(name="a", cpus=2, memory_bytes=1e8),))
    assert len(estimate(plan, tiny).unplaceable) == 28 + 4


def test_times_are_those_measured_in_the_project(tmp_path: Path) -> None:
    """A machine three times as slow as that of the fit."""
    plan = make_plan(read_spec(ROOT / "examples/mini.toml"))
    assert measured_pace(tmp_path / "s.toml", "none", None) == Pace()  # there is none yet
    project = create_project(tmp_path)
    expected = estimate(plan, uniform(cpus=2))
    for trial in plan.trials[::5]:
        took = 3 * expected.placed[trial.key].seconds
        project.ledger.write(trial, _measured(trial, took))
    found = estimate(plan, uniform(cpus=2), measured_pace(tmp_path / "s.toml", "none", None))
    assert found.measured
    assert found.cost.core_hours == pytest.approx(3 * expected.cost.core_hours)
    assert found.schedule.makespan == pytest.approx(3 * expected.schedule.makespan, rel=0.02)


def _measured(trial: Trial, seconds: float) -> Measurement:
    return Measurement(
        tokens=trial.tokens,
        status="complete",
        reason=None,
        loss=2.0,
        loss_stderr=0.01,
        bits_per_byte=None,
        seconds=seconds,
        mfu=0.3,
        device="x86_64 CPU, 1 thread",
        curve=(),
        versions={},
    )
