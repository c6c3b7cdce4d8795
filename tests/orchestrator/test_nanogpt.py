"""The glue for nanoGPT's own train.py, with a stand-in that takes its options and prints its lines.

The stand-in trains nothing; its losses are a function of the step, so that it is known which step
a row's loss is of.
"""

import json
import math
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planner import make_plan
from orchestrator.spec import read_spec
from trainers.command import Commanded
from trainers.trial import Measurement, Trial
from trainers.workspace import Scratch

EXAMPLE = Path(__file__).parents[2] / "examples/nanogpt"
STAND_IN = """
import json, pathlib, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
number = lambda name: int(options[name])
checkpoint = pathlib.Path(options["out_dir"], "ckpt.pt")
iter_num = 0
if options["init_from"] == "resume":
    iter_num = int(checkpoint.read_text())
json.dump([options, iter_num], open(pathlib.Path(options["out_dir"]).parent.parent / "seen", "w"))
val = lambda step: 4.0 - step / 10_000
print("tokens per iteration will be: 16,384")
print("number of parameters: 0.03M")
died = pathlib.Path("died")
while True:
    if iter_num % number("eval_interval") == 0:
        losses = f"train loss {val(iter_num) - 0.1:.4f}, val loss {val(iter_num):.4f}"
        print(f"step {iter_num}: {losses}")
        if iter_num > 0:
            print("saving checkpoint to " + options["out_dir"])
            checkpoint.write_text(str(iter_num))
    if iter_num % 10 == 0:
        print(f"iter {iter_num}: loss {val(iter_num) + 0.1:.4f}, time 20.00ms, mfu 1.00%")
    iter_num += 1
    if iter_num == 3 * number("max_iters") // 5 and DIES and not died.exists():
        died.touch()
        import time; time.sleep(0.5)
        raise SystemExit(1)
    if iter_num > number("max_iters"):
        break
"""


@pytest.fixture
def trials(tmp_path: Path) -> Callable[..., list[Trial]]:
    """Trials of the example in a clone that has the stand-in."""

    def make(*, dies: bool = False) -> list[Trial]:
        for name in ("nanogpt_glue.py", "nanogpt.toml"):
            shutil.copy(EXAMPLE / name, tmp_path)
        (tmp_path / "train.py").write_text(STAND_IN.replace("DIES", str(dies)))
        for name in ("model.py", "configurator.py"):
            (tmp_path / name).write_text("")
        text = (tmp_path / "nanogpt.toml").read_text()
        (tmp_path / "sweep.toml").write_text(
            text.replace("[1e17, 3e17, 1e18]", "[{ flops = 3e14, widths = [64, 128, 192, 256] }]")
        )
        return make_plan(read_spec(tmp_path / "sweep.toml")).trials

    return make


def _measured(trial: Trial, place: Scratch) -> Measurement:
    *_, last = Commanded().train(trial, place)
    assert isinstance(last, Measurement)
    return last


def test_its_last_evaluation_is_the_row_whatever_the_steps(trials, tmp_path: Path) -> None:
    for n, trial in enumerate(trials()[:4]):
        (place := tmp_path / f"{n}").mkdir()
        measured, steps = _measured(trial, Scratch(place)), trial.hyperparameters.steps
        assert (measured.loss, measured.loss_step) == (round(4.0 - steps / 10_000, 4), steps)
        options, _ = json.loads((place / "seen").read_text())
        assert int(options["max_iters"]) == steps
        tokens = int(options["batch_size"]) * int(options["block_size"])
        assert tokens * int(options["gradient_accumulation_steps"]) * steps == trial.tokens
        assert float(options["learning_rate"]) == trial.hyperparameters.matrix_rate
        by_step = {point.step: point for point in measured.curve}
        assert by_step[steps].heldout_loss == measured.loss
        evaluated = [p.step for p in measured.curve if p.heldout_loss is not None]
        assert evaluated == [s for s in by_step if s % int(options["eval_interval"]) == 0]


def test_the_documentation_shows_the_example() -> None:
    text = (EXAMPLE.parents[1] / "docs/trainers.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (shown,) = [tomllib.loads(block) for block in blocks if "nanogpt_glue" in block]
    example = tomllib.loads((EXAMPLE / "nanogpt.toml").read_text())
    assert {name: example[name] for name in shown} == shown


def test_parameters_are_those_of_its_gpt(trials, tmp_path: Path) -> None:
    """12 d^2 a block, the gains of its norms, one table for embedding and head, and positions."""
    trial = trials()[0]
    measured, d = _measured(trial, Scratch(tmp_path)), trial.shape.width
    blocks = trial.shape.depth * (12 * d * d + 2 * d) + d
    assert measured.params == {
        "non_embedding": blocks,
        "matmul": blocks + 50304 * d,
        "total": blocks + 50304 * d + 1024 * d,
    }


def test_it_goes_on_from_its_own_checkpoint(trials, tmp_path: Path) -> None:
    trial = next(t for t in trials(dies=True) if t.hyperparameters.steps % 5 == 0)
    (place := tmp_path / "place").mkdir()
    workspace = Scratch(place, every_steps=1)
    with pytest.raises(Exception, match="exited with 1"):
        list(Commanded().train(trial, workspace))
    measured, steps = _measured(trial, workspace), trial.hyperparameters.steps
    assert json.loads((place / "seen").read_text())[0]["init_from"] == "resume"
    assert measured.resumed_from == 2 * steps // 5
    assert measured.loss == pytest.approx(4.0 - steps / 10_000, abs=5e-5)
    assert math.isclose(measured.curve[-1].tokens, trial.tokens)
