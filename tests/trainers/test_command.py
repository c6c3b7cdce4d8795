"""The user's own program: what it is given, and what of it is in a trial's key."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from analysis.errors import InputError
from tests.trainers.commands import RESULT, MakeCommand, failure, measure
from trainers.command import Commanded, values
from trainers.template import NODE_GPUS, PLACEHOLDERS, expand
from trainers.trial import Trial
from trainers.workspace import Scratch


def test_a_program_gets_what_the_trial_has(commanded: MakeCommand, workspace: Scratch) -> None:
    names = [name for name in PLACEHOLDERS if name != "python"]
    trial = commanded(
        f"""
        import json, os, sys
        json.dump([sys.argv[1:], os.environ["SIZE"], os.getcwd()], open(sys.argv[1], "w"))
        print('{RESULT}')
        """,
        str(workspace.directory / "seen.json"),
        *(f"{{{name}}}" for name in names),
        env=(("SIZE", "{width}x{depth} {{}}"),),
    )
    measure(trial, workspace)
    (_, *given), size, where = json.loads((workspace.directory / "seen.json").read_text())
    expected = values(trial, workspace.directory / "command-0")
    assert dict(zip(names, given, strict=True)) == {name: expected[name] for name in names}
    assert size == "24x2 {}"
    assert where == trial.command.directory
    h = trial.hyperparameters
    assert float(expected["learning_rate"]) == h.matrix_rate
    assert int(expected["sequences"]) * trial.shape.context == h.batch_tokens
    assert int(expected["steps"]) * h.batch_tokens == int(expected["tokens"]) == trial.tokens


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_a_rank_of_several_sees_all_gpus_of_its_node(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """As under torchrun: LOCAL_RANK is an index among them. Ray sets AMD's variable for AMD's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(variable, "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(NODE_GPUS, "4,2")
    program = """
        import json, os
        names = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"} & set(os.environ)
        (seen,) = [os.environ[name].split(",") for name in names]
        print(json.dumps({"loss": float(seen[int(os.environ["LOCAL_RANK"])]), "tokens": 25600}))
    """
    assert measure(commanded(program), workspace).loss == 2.0


def test_a_program_inherits_the_environment_of_its_worker(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that secrets need not be in the sweep file; what that says comes last."""
    monkeypatch.setenv("A_SECRET", "2.5")
    monkeypatch.setenv("CHANGED", "9")
    program = """
        import json, os
        loss = float(os.environ["A_SECRET"]) + float(os.environ["CHANGED"])
        assert os.environ["OMP_NUM_THREADS"] == os.environ["PYTHONUNBUFFERED"] == "1"
        print(json.dumps({"loss": loss, "tokens": 25600}))
    """
    trial = commanded(program, env=(("CHANGED", "1"),))
    assert measure(trial, workspace).loss == 3.5
    assert "2.5" not in json.dumps(trial.to_dict()["command"])


SECRET = "s3cr3t-of-the-team"


def test_a_variable_of_env_from_reaches_the_program_and_no_file(
    commanded: MakeCommand,
    workspace: Scratch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Masked in what it prints, which is kept in projects; also line by line, and with spaces."""
    monkeypatch.setenv("TEAM_TOKEN", SECRET)
    monkeypatch.setenv("TEAM_KEY", f"-----BEGIN KEY-----\nsecond-line\n{SECRET}-and-more")
    program = """
        import hashlib, json, os, sys
        print("my token is", os.environ["TEAM_TOKEN"])
        print("and my key", os.environ["TEAM_KEY"], file=sys.stderr)
        digest = hashlib.sha256(os.environ["TEAM_TOKEN"].encode()).hexdigest()
        open(sys.argv[1], "w").write(digest)
        print(json.dumps({"loss": 3.0, "tokens": 25600}))
    """
    seen = str(workspace.directory / "seen")
    trial = commanded(program, seen, env_from=("TEAM_KEY", "TEAM_TOKEN"))
    measured = measure(trial, workspace)
    assert measured.loss == 3.0
    assert Path(seen).read_text() == hashlib.sha256(SECRET.encode()).hexdigest()
    out = capsys.readouterr().out
    assert out.splitlines().count("my token is ***") == 1
    assert out.count("***") == 4
    for text in (out, json.dumps(trial.to_dict()), repr(measured)):
        assert not any(part in text for part in (SECRET, "second-line", "-and-more"))


def test_a_secret_is_masked_in_the_error_that_quotes_it(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_TOKEN", SECRET)
    program = """
        import json, os
        print(json.dumps({"loss": 3.0, "status": os.environ["TEAM_TOKEN"]}))
    """
    message = failure(commanded(program, env_from=("TEAM_TOKEN",)), workspace)
    assert "***" in message
    assert SECRET not in message


def test_a_short_value_of_env_from_masks_nothing(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREADS", "3")
    assert measure(commanded(f"print('{RESULT}')", env_from=("THREADS",)), workspace).loss == 3.0


def test_a_variable_that_the_machine_lacks_is_named(
    commanded: MakeCommand, workspace: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEAM_TOKEN", raising=False)
    with pytest.raises(
        InputError, match=r"command\.env_from names TEAM_TOKEN, and the environment"
    ):
        list(Commanded().train(commanded("", env_from=("TEAM_TOKEN",)), workspace))


def test_names_of_env_from_are_in_no_key(commanded: MakeCommand) -> None:
    plain, given = commanded(""), commanded("", env_from=("TEAM_TOKEN",))
    assert plain.key == given.key
    assert plain.command.hash == given.command.hash
    assert Trial.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    older = json.loads(json.dumps(plain.to_dict()))
    del older["command"]["env_from"]
    assert Trial.from_dict(older) == plain


def test_every_placeholder_has_a_value(commanded: MakeCommand, tmp_path: Path) -> None:
    assert set(values(commanded(""), tmp_path)) == set(PLACEHOLDERS)


@pytest.mark.parametrize("text", ["{widht}", "{width:03d}", "{width!r}", "{}", "{0}", "{width.x}"])
def test_an_unknown_placeholder_is_named_with_the_known_ones(text: str) -> None:
    with pytest.raises(InputError, match=r"has the placeholder \{.*\}; there are width, depth"):
        expand(text, dict.fromkeys(PLACEHOLDERS, ""))


@pytest.mark.parametrize("text", ["{width", "width}", "{"])
def test_a_single_brace_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has a brace without its partner: double it"):
        expand(text, dict.fromkeys(PLACEHOLDERS, ""))


def test_no_shell_sees_the_command(
    commanded: MakeCommand, workspace: Scratch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = commanded(
        f"""
        import sys
        print(sys.argv[1])
        print('{RESULT}')
        """,
        "$HOME; rm -rf * `id`",
    )
    assert measure(trial, workspace).loss == 3.0
    assert "$HOME; rm -rf * `id`" in capsys.readouterr().out


# What decides a trial


@pytest.mark.parametrize(
    "change",
    [
        {"run": ("other",)},
        {"files": (("train.py", "0"),)},
        {"env": (("A", "b"),)},
    ],
)
def test_what_decides_the_result_is_in_the_key(commanded: MakeCommand, change: dict) -> None:
    trial = commanded("")
    changed = dataclasses.replace(trial, command=dataclasses.replace(trial.command, **change))
    assert changed.key != trial.key
    assert changed.command.hash != trial.command.hash


@pytest.mark.parametrize("change", [{"directory": "/"}, {"gpus": 2.0}, {"timeout_seconds": 9.0}])
def test_what_says_how_it_runs_is_not(commanded: MakeCommand, change: dict) -> None:
    trial = commanded("")
    changed = dataclasses.replace(trial, command=dataclasses.replace(trial.command, **change))
    assert (changed.key, changed.command.hash) == (trial.key, trial.command.hash)


def test_a_commanded_trial_survives_json(commanded: MakeCommand) -> None:
    trial = commanded("", env=(("A", "b"),))
    again = Trial.from_dict(json.loads(json.dumps(trial.to_dict())))
    assert again == trial
    assert again.key == trial.key


def test_a_file_that_changed_since_the_plan_is_named(
    commanded: MakeCommand, workspace: Scratch, tmp_path: Path
) -> None:
    trial = commanded("")
    (tmp_path / "train.py").write_text("print()")
    with pytest.raises(InputError, match=r"train\.py has hash .* was planned with .*: it changed"):
        list(Commanded().train(trial, workspace))
    (tmp_path / "train.py").unlink()
    with pytest.raises(InputError, match=r"train\.py cannot be read on .*: No such file"):
        list(Commanded().train(trial, workspace))
