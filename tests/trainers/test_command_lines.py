"""What the user's own program may say, and what is made of it."""

import json
import time

import pytest

from tests.trainers.commands import RESULT, MakeCommand, failure, measure
from trainers.command import Commanded
from trainers.flops import flops_per_token
from trainers.told import CommandError, ProtocolError
from trainers.trial import Measurement, Progress, Step, Trial
from trainers.workspace import Scratch

TALKS = """
import json, sys
steps, batch = int(sys.argv[1]), int(sys.argv[2])
print("a line of log")
print("and one of errors", file=sys.stderr)
for step in (1, steps // 2, steps):
    line = {"step": step, "train_loss": 5.0 - step / steps}
    if step > 1:
        line["heldout_loss"] = 5.1 - step / steps
    print(json.dumps(line))
print('{"of": "another kind"}')
print(json.dumps({"loss": 3.25, "loss_stderr": 0.01, "tokens": steps * batch}))
"""


def test_its_lines_become_events_and_a_measurement(
    commanded: MakeCommand, workspace: Scratch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = commanded(TALKS, "{steps}", "{batch_tokens}")
    *events, measured = Commanded().train(trial, workspace)
    steps = trial.hyperparameters.steps
    half = steps // 2
    kinds = [(type(event), event.step) for event in events]
    assert kinds == [(kind, step) for step in (1, half, steps) for kind in (Progress, Step)]
    assert isinstance(measured, Measurement)
    assert (measured.status, measured.loss, measured.loss_stderr) == ("complete", 3.25, 0.01)
    assert (measured.tokens, measured.steps, measured.resumed_from) == (trial.tokens, steps, 0)
    assert [p.train_loss for p in measured.curve] == [5 - 1 / steps, 5 - half / steps, 4.0]
    assert measured.curve[-1].heldout_loss == 3.25
    assert measured.curve[-1].flops == pytest.approx(trial.tokens * flops_per_token(trial.shape))
    assert (measured.params, measured.flops) == (None, None)
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == ["a line of log", "and one of errors", '{"of": "another kind"}']


def test_its_lines_may_come_in_a_file(commanded: MakeCommand, workspace: Scratch) -> None:
    trial = commanded(
        """
        import sys, time
        with open(sys.argv[1], "w") as file:
            file.write('{"step": 100, "train_loss": 4.0}\\n')
            file.flush()
            time.sleep(0.3)
            file.write('{"loss": 3.0}')
        """,
        "{result}",
    )
    events = list(Commanded().train(trial, workspace))
    assert [type(event) for event in events] == [Progress, Step, Measurement]
    assert events[-1].loss == 3.0


def test_what_it_declares_of_its_model_is_taken(commanded: MakeCommand, workspace: Scratch) -> None:
    told = {"params_non_embedding": 9_000, "params_matmul": 10_000, "params_total": 11_000}
    trial = commanded(
        f"""
        import json
        print(json.dumps({{"step": 100, "train_loss": 4.0}}))
        print(json.dumps({{"loss": 3.0, "flops": 1.5e9, **{told}}}))
        """
    )
    measured = measure(trial, workspace)
    assert measured.params == {"non_embedding": 9_000, "matmul": 10_000, "total": 11_000}
    assert measured.flops == 1.5e9
    (point,) = measured.curve
    assert point.flops == pytest.approx(1.5e9 * point.tokens / trial.tokens)


def test_flops_follow_declared_parameters(commanded: MakeCommand, workspace: Scratch) -> None:
    """3 x 2 FLOPs a token for each further parameter that multiplies an activation."""
    told = RESULT.replace("}", ', "params_matmul": 30000, "params_total": 40000}')
    trial = commanded(f"print('{told}')")
    measured = measure(trial, workspace)
    ours = flops_per_token(trial.shape) * trial.tokens
    assert measured.flops == pytest.approx(ours + 6 * (30_000 - 19_968) * trial.tokens)


def test_a_loss_that_is_none_is_a_divergence(commanded: MakeCommand, workspace: Scratch) -> None:
    for said, reason in (
        ('{"loss": NaN}', "the held-out loss is nan"),
        ('{"loss": Infinity}', "the held-out loss is inf"),
        ('{"loss": null, "status": "diverged", "reason": "spiked"}', "spiked"),
        (RESULT.replace("3.0", "5.6"), "the held-out loss 5.600 is above 5.545 nats/token, that o"),
    ):
        measured = measure(commanded(f"print('{said}')"), workspace)
        assert (measured.status, measured.loss) == ("diverged", None)
        assert measured.reason is not None
        assert reason in measured.reason


def test_a_training_loss_that_is_none_ends_the_program(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    trial = commanded(
        """
        import time
        print('{"step": 7, "train_loss": NaN}')
        time.sleep(600)
        """
    )
    started = time.monotonic()
    measured = measure(trial, workspace)
    assert time.monotonic() - started < 20
    assert (measured.status, measured.steps) == ("diverged", 7)
    assert measured.reason == (
        f"the training loss was nan at step 7 of {trial.hyperparameters.steps}"
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('{"loss": "3.0"}', "loss is '3.0', but it should be a valid number"),
        ('{"loss": 3.0, "los_stderr": 0.1}', "has the key 'los_stderr'; there are loss, loss_std"),
        ('{"loss": -1.0}', "its loss is -1, but nats/token are above 0"),
        ('{"loss": null}', "its loss is null, but its status is not diverged"),
        ('{"loss": 3.0, "tokens": true}', "tokens is True, but it should be a valid integer"),
        ('{"loss": 3.0, "status": "fine"}', "should be 'complete' or 'diverged'"),
        ('{"loss": 3.0, "flops": 0}', "flops is 0, but it should be greater than 0"),
        ('{"train_loss": 3.0}', "is no progress: the key 'step' is missing"),
        ('{"heldout_loss": 3.0}', "is no progress: the key 'step' is missing"),
        ('{"heldout_loss": null, "step": 1}', "its heldout_loss is null, and it has no train_loss"),
        ('{"train_loss": null, "step": 1}', "its train_loss is null: leave it out, or give NaN"),
        (
            '{"heldout_loss": 3.0, "step": 1, "lr": 1}',
            "it has the key 'lr'; there are step, train_",
        ),
        ('{"train_loss": 3.0, "step": 1.5}', "step is 1.5, but it should be a valid integer"),
        ('{"checkpoint": 0}', "is no checkpoint: checkpoint is 0, but it should be greater than"),
        ('{"train_loss": 3.0, "step": 100000}', "it told of step 100000, but the trial has"),
        ('{"loss": 3.0, "params_total": 5}', "params_total = 5, of which each includes the one"),
        ('{"loss": 3.0, "tokens": 5}', "its result is of 5 tokens, but the trial's horizon is"),
        ('{"loss": 3.0}\\n{"loss": 3.1}', "it gave a second result, '{\"loss\": 3.1}'"),
        (
            '{"step": 9, "train_loss": 3.0}\\n{"step": 8, "train_loss": 3.0}',
            "it told of step 8 after step 9",
        ),
    ],
)
def test_a_line_that_makes_no_sense_is_an_error_that_shows_it(
    commanded: MakeCommand, workspace: Scratch, said: str, why: str
) -> None:
    assert why in failure(commanded(f"print('{said}')"), workspace)


def test_a_result_may_be_a_batch_off(commanded: MakeCommand, workspace: Scratch) -> None:
    program = """
    import sys
    print('{"loss": 3.0, "tokens": %d}' % (int(sys.argv[1]) + int(sys.argv[2])))
    """
    trial = commanded(program, "{tokens}", "{batch_tokens}")
    assert measure(trial, workspace).tokens == trial.tokens
    assert "may be a batch off" in failure(commanded(program, "{tokens}", "1{steps}"), workspace)


def test_a_horizon_that_was_not_reached_is_no_row(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    """Without tokens in the result its last step tells that, which some count from 0."""
    program = """
    import sys
    for step in sys.argv[1:]:
        print('{"step": %s, "train_loss": 3.0}' % step)
    print('{"loss": 3.0}')
    """
    for steps in (["50", "100"], ["99"], ["101"]):
        assert measure(commanded(program, *steps), workspace).status == "complete"
    for steps, seen in (
        (["50"], "of 100 steps the last one that it told of is 50, and its result does not say"),
        (["49", "98"], "of 100 steps the last one that it told of is 98, and its result does"),
        ([], "of 100 steps it told of none, and its result does not say after how many tokens"),
    ):
        assert failure(commanded(program, *steps), workspace).startswith(seen)


# Losses of a step, and of which step the result is

TALKS_OF = """
import json, sys
losses, result = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for step, train, heldout in losses:
    line = {"step": step, "train_loss": train}
    print(json.dumps(line if heldout is None else {**line, "heldout_loss": heldout}))
print(json.dumps(result))
"""


def _told(make: MakeCommand, losses: list[tuple], **result: object) -> Trial:
    """A trial of 100 steps whose program tells such losses by step, and such a result."""
    return make(TALKS_OF, json.dumps(losses), _braced(json.dumps(result)))


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def test_lines_of_one_step_are_one_point(commanded: MakeCommand, workspace: Scratch) -> None:
    """nanoGPT prints "step 50: train loss, val loss" and then "iter 50: loss"."""
    losses = [(50, 3.5, 3.75), (50, 3.25, None), (100, 3.0, None), (100, 2.75, 2.5)]
    measured = measure(_told(commanded, losses, loss=2.5), workspace)
    points = [(p.step, p.train_loss, p.heldout_loss) for p in measured.curve]
    assert points == [(50, 3.25, 3.75), (100, 2.75, 2.5)]
    assert (measured.status, measured.loss, measured.loss_step) == ("complete", 2.5, 100)


def test_an_evaluation_may_have_a_line_of_its_own(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    """Before or after the line with the training loss; a step with none is no point."""
    trial = commanded(
        """
        print('{"step": 0, "heldout_loss": 5.5}')
        print('{"step": 25, "heldout_loss": 3.75, "tokens": 777}')
        print('{"step": 25, "train_loss": 3.5}')
        print('{"step": 50, "train_loss": 3.25}')
        print('{"step": 50, "heldout_loss": 3.375}')
        print('{"step": 60, "heldout_loss": 3.125}')
        print('{"step": 100, "train_loss": 2.75}')
        print('{"step": 100, "heldout_loss": 2.5}')
        print('{"loss": 2.5}')
        """
    )
    *events, measured = Commanded().train(trial, workspace)
    assert isinstance(measured, Measurement)
    points = [(p.step, p.train_loss, p.heldout_loss) for p in measured.curve]
    assert points == [(25, 3.5, 3.75), (50, 3.25, 3.375), (100, 2.75, 2.5)]
    assert measured.curve[0].tokens == 777
    assert (measured.status, measured.loss, measured.loss_step) == ("complete", 2.5, 100)
    signs = [event.step for event in events if isinstance(event, Step)]
    assert signs == [0, 25, 25, 50, 50, 60, 100, 100]


def test_an_evaluation_at_the_last_step_is_the_end(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    program = """
    import sys
    print('{"step": 90, "train_loss": 3.25}')
    print('{"step": %s, "heldout_loss": 3.0}' % sys.argv[1])
    print('{"loss": %s}' % sys.argv[2])
    """
    measured = measure(commanded(program, "100", "3.0"), workspace)
    assert (measured.status, measured.loss_step) == ("complete", 100)
    why = failure(commanded(program, "95", "2.5"), workspace)
    assert why.startswith("of 100 steps the last one that it told of is 95, ")
    stale = commanded(program.replace('"loss": %s', '"tokens": 25600, "loss": %s'), "95", "3.0")
    assert "is that of step 95, told before" in failure(stale, workspace)


def test_lines_of_other_loggers_are_log(
    commanded: MakeCommand, workspace: Scratch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = ['{"train_loss": 3.5, "epoch": 1.0}', '{"heldout_loss": 3.0, "iter": 50}']
    program = "".join(f"print('{line}')\n" for line in [*foreign, RESULT])
    measured = measure(commanded(program), workspace)
    assert (measured.status, measured.curve) == ("complete", ())
    assert capsys.readouterr().out.splitlines() == foreign


def test_tokens_of_a_step_stay_too(commanded: MakeCommand, workspace: Scratch) -> None:
    trial = commanded(
        """
        print('{"step": 50, "train_loss": 3.0, "tokens": 777}')
        print('{"step": 50, "train_loss": 3.5}')
        print('{"step": 100, "train_loss": 3.0}')
        print('{"loss": 3.0}')
        """
    )
    assert [p.tokens for p in measure(trial, workspace).curve] == [777, trial.tokens]


@pytest.mark.parametrize("at_the_end", [{}, {"tokens": 25_600}])
@pytest.mark.parametrize(
    ("losses", "result", "step"),
    [
        ([(25, 3.5, 3.5), (50, 3.2, 3.25), (75, 3.1, 3.0), (100, 2.9, None)], 3.0, 75),
        ([(25, 3.5, 3.5), (50, 3.2, 3.0), (75, 3.1, 3.25), (100, 2.9, None)], 3.0, 50),  # the best
        ([(0, 5.5, 5.5), (100, 2.9, None)], 5.5, 0),
        ([(98, 3.0, 3.0), (99, 2.9, None)], 3.0, 98),
    ],
)
def test_a_loss_of_an_earlier_step_is_not_that_of_the_last_one(
    commanded: MakeCommand,
    workspace: Scratch,
    losses: list[tuple],
    result: float,
    step: int,
    at_the_end: dict[str, int],
) -> None:
    why = failure(_told(commanded, losses, loss=result, **at_the_end), workspace)
    assert why.startswith(f"its result, a held-out loss of {result:g}, is that of step {step}, ")
    assert "the trial has 100 steps: have it evaluate at step {steps}" in why


@pytest.mark.parametrize(
    ("losses", "result", "step"),
    [
        ([(50, 3.0, 3.0), (100, 2.9, 2.75)], {"loss": 2.75}, 100),
        ([(50, 3.0, 3.0), (99, 2.9, 2.75)], {"loss": 2.75}, 99),  # counted from 0
        ([(50, 3.0, 3.0), (100, 2.9, 3.0)], {"loss": 3.0}, 100),  # the same again
        ([(50, 3.0, 3.0), (100, 2.9, None)], {"loss": 2.75}, 100),  # measured for the result
        ([(50, 3.0, 3.0)], {"loss": 2.75, "tokens": 25_344}, 99),
        ([(50, 3.0, None), (100, 2.9, None)], {"loss": 3.0}, 100),
    ],
)
def test_the_step_of_a_loss_is_kept(
    commanded: MakeCommand,
    workspace: Scratch,
    losses: list[tuple],
    result: dict[str, float],
    step: int,
) -> None:
    measured = measure(_told(commanded, losses, **result), workspace)
    assert (measured.loss, measured.loss_step) == (result["loss"], step)


def test_a_training_that_diverged_needs_no_evaluation_at_its_end(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    said = {"loss": 3.0, "status": "diverged"}
    measured = measure(_told(commanded, [(50, 3.0, 3.0)], **said), workspace)
    assert (measured.status, measured.loss, measured.loss_step) == ("diverged", None, None)


def test_what_would_be_told_again_is_told_apart_from_what_may_pass(
    commanded: MakeCommand, workspace: Scratch
) -> None:
    """Only the latter is worth another attempt."""
    for program, protocol in (
        ("pass", True),
        ('print(\'{"loss": "x"}\')', True),
        ("raise SystemExit(3)", False),
        ("import os; os.abort()", False),
    ):
        with pytest.raises(CommandError) as caught:
            measure(commanded(program), workspace)
        assert isinstance(caught.value, ProtocolError) == protocol
