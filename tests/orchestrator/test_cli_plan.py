"""`isoflop plan`: what a person and a script are told of a sweep on a cluster."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
EXAMPLES = Path(__file__).parents[2] / "examples"
H100S = ("--gpu", "H100", "--nodes", "8", "--price-per-gpu-hour", "2.5")


@pytest.fixture
def sweep(sweep_file: Callable[..., Path]) -> Callable[..., Path]:
    """15 simulated trials of an hour on two GPUs each."""

    def write(extra: str = "", **settings: object) -> Path:
        return sweep_file(extra, simulated="seconds = 3600.0\ngpus = 2.0", **settings)

    return write


def test_a_plan_on_a_cluster_says_what_it_takes(isoflop: Run, sweep) -> None:
    """15 x 2 GPU-hours; four at once on eight GPUs, so four hours, of which the last has three."""
    code, out, err = isoflop("plan", sweep(), "--gpu", "H100", "--price-per-gpu-hour", "2.5")
    assert (code, err) == (0, "")
    assert "1 node of 8 GPUs H100 SXM and 64 cores" in out
    assert "30 GPU-hours, 75 at 2.5 a GPU-hour" in out
    assert "Makespan  4 h" in out
    assert "Idle      6.3% of the 8 GPUs" in out


def test_options_go_before_the_file_and_the_json_is_the_same_plan(isoflop: Run, sweep) -> None:
    path = sweep('[cluster]\ngpu = "T4"\nnodes = 2\n')
    _, out, _ = isoflop("plan", path, "--json", "--gpus-per-node", "4")
    found = json.loads(out)
    assert found["cluster"]["description"] == "2 nodes of 4 GPUs T4 and 32 cores"
    assert found["classes"] == {"2 GPUs": 15}
    assert found["gpu_hours"] == pytest.approx(30)
    assert found["money"] is None
    assert {t["placement"]["class"] for t in found["trials"]} == {"2 GPUs"}
    assert found["bound_seconds"] <= found["makespan_seconds"] < 1.1 * 4 * 3600


def test_the_cluster_example_is_planned_on_h100s(isoflop: Run) -> None:
    code, out, _ = isoflop("plan", EXAMPLES / "cluster.toml", *H100S)
    assert code == 0
    for said in (
        "0.0921 PF-days",
        "GPU-hours",
        "of checkpoints",
        "expected in bf16, from published",
    ):
        assert said in out


def test_the_cluster_example_shares_gpus_where_the_forecast_gains_by_it(isoflop: Run) -> None:
    """On eight H100, with MPS as its file says, and without; compilation is in all times."""
    plans = {
        mps: json.loads(isoflop("plan", EXAMPLES / "cluster.toml", option, "--json")[1])
        for mps, option in ((True, "--mps"), (False, "--no-mps"))
    }
    for mps, plan in plans.items():
        sharing, trials = plan["sharing"], plan["trials"]
        assert plan["makespan_seconds"] == pytest.approx(
            min(sharing["makespan"], sharing["makespan_unshared"])
        )
        assert sharing["used"] is (sharing["makespan"] < sharing["makespan_unshared"])
        shared = any(t["placement"]["gpus"] < 1 for t in trials)
        assert shared is sharing["used"] is mps
        assert all(t["placement"]["compile_seconds"] > 15 for t in trials)
        assert all(t["placement"]["seconds"] > t["placement"]["compile_seconds"] for t in trials)
    with_mps, without = plans[True], plans[False]
    assert with_mps["sharing_with_mps"] is None  # it is what there is
    assert without["sharing_with_mps"] == with_mps["sharing"]
    assert with_mps["gpu_hours"] < without["gpu_hours"]
    # Each trial's GPU-hours at 16% of a datasheet's peak, as shares once had them, were too few.
    floor = without["without_limits"]["flops"] / (0.3 * 989e12) / 3600
    assert with_mps["gpu_hours"] > floor


def test_the_plan_says_what_shares_bring_with_and_without_mps(isoflop: Run) -> None:
    _, out, _ = isoflop("plan", EXAMPLES / "cluster.toml", "--mps")
    text = " ".join(out.split())
    assert re.search(r"Shares \d+ trials on shares take [\d.]+ in place of [\d.]+ GPU-hours", text)
    assert "8 GPUs H100 SXM (MPS) and 64 cores" in text
    assert re.search(r"Compiling [\d.]+ min of the trials' [\d.]+ h, before they train", text)
    _, out, _ = isoflop("plan", EXAMPLES / "cluster.toml", "--no-mps")
    text = " ".join(out.split())
    assert "Shares none, since they would save nothing without MPS; with MPS, " in text


def test_a_type_that_nobody_knows_is_planned_with_and_said_to_be_unknown(isoflop: Run) -> None:
    file = EXAMPLES / "cluster.toml"
    code, out, _ = isoflop("plan", file, "--gpu", "X1", "--gpu-memory", "96", "--json")
    assert code == 0
    found = json.loads(out)
    assert "X1 (taken for T4s, 96 GB each" in found["cluster"]["description"]
    assert "the speed of a T4 is assumed" in found["unknown_gpus"]
    _, out, _ = isoflop("plan", file, "--gpu", "X1", "--gpu-memory", "96")
    assert "! the type of some GPUs is not known (X1)" in " ".join(out.split())
    known = json.loads(isoflop("plan", file, "--gpu", "T4", "--gpu-memory", "96", "--json")[1])
    assert known["unknown_gpus"] is None
    assert known["makespan_seconds"] == pytest.approx(found["makespan_seconds"])


def test_trials_that_fit_nowhere_are_named_after_the_table(isoflop: Run, sweep) -> None:
    code, out, err = isoflop("plan", sweep(), "--gpu", "H100", "--gpus-per-node", "1")
    assert code == 2
    assert "needs 2 GPUs, and there are 1" in out
    assert "and 10 more do not fit" in out
    assert err.startswith("isoflop: of 15 trials 15 would fit nowhere on 1 node of 1 GPU H100 SXM")
    code, out, _ = isoflop("plan", sweep(), "--gpu", "H100", "--gpus-per-node", "1", "--json")
    assert code == 2
    assert len(json.loads(out)["unplaceable"]) == 15


def test_one_more_trial_that_does_not_fit_is_one(isoflop: Run, sweep) -> None:
    path = sweep(budgets="[{ flops = 1e17, widths = [320, 352, 384, 416, 448, 480] }]")
    _, out, _ = isoflop("plan", path, "--gpu", "H100", "--gpus-per-node", "1")
    assert "and 1 more does not fit" in out


def test_without_a_cluster_what_this_machine_cannot_hold_is_no_error(isoflop: Run) -> None:
    code, out, err = isoflop("plan", EXAMPLES / "mini.toml")
    assert (code, err) == (0, "")
    assert "1 core" in out


def test_a_cap_that_would_be_broken_is_said(isoflop: Run, sweep) -> None:
    """Two budgets' ten trials at 1e16 and 1e17 FLOPs are within it, those at 1e18 are not."""
    path = sweep("[limits]\nflops = 6e17\n")
    _, out, _ = isoflop("plan", path, "--gpu", "H100")
    assert "limits.flops: 5 trials would be held back" in out
    assert "0 of 5" in out
    assert "5.5e+17 FLOPs within the limits" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "TPU"), "--gpu is 'TPU', which is no known type: give --gpu-memory"),
        (
            ("--nodes", "3"),
            "--nodes is 3, but nothing says of what: give --gpu, such as H100, or --cpus-per-node",
        ),
        (("--gpu", "H100", "--gpu-memory", "0"), "isoflop: --gpu-memory is 0"),
        (("--gpu", "H100", "--nodes", "0"), "isoflop: --nodes is 0, but it should be greater"),
        (("--gpu", "H100", "--price-per-gpu-hour", "-1"), "--price-per-gpu-hour is -1"),
        (("--price-per-gpu-hour", "2.5"), "this cluster has no GPUs: add --gpu"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(isoflop: Run, options, message) -> None:
    code, out, err = isoflop("plan", EXAMPLES / "mini.toml", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_project_that_is_not_there_yet_has_measured_nothing(isoflop: Run, tmp_path: Path) -> None:
    """So that plan and run take the same options."""
    code, out, err = isoflop("plan", EXAMPLES / "mini.toml", "--project", tmp_path / "none")
    assert (code, err) == (0, "")
    assert "as measured in this project" not in out
    assert not (tmp_path / "none").exists()
