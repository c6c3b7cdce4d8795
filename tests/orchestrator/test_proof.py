"""Every node proves that it works on the same project, through the same isoflop."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

import orchestrator
from analysis.errors import InputError
from orchestrator import proof
from orchestrator.checks import Check
from orchestrator.connection import LOOPBACK_ONLY
from orchestrator.proof import (
    ROOMS,
    answer,
    fingerprint,
    forget_drivers_before,
    nonce_name,
    prove_gpus,
    witness,
)
from orchestrator.storage import Storage


def test_a_witness_sees_the_drivers_nonce_or_says_so(storage: Storage) -> None:
    with pytest.raises(InputError, match=f"{socket.gethostname()} does not see the same"):
        witness(storage, "ours", 3)
    storage.replace(nonce_name(3), b"theirs")
    with pytest.raises(InputError, match="an s3:// or gs:// URI"):
        witness(storage, "ours", 3)
    storage.replace(nonce_name(3), b"ours")
    witness(storage, "ours", 3)
    with pytest.raises(InputError):
        witness(storage, "ours", 4)  # of another driver


def test_what_killed_drivers_and_their_nodes_left_is_removed(storage: Storage) -> None:
    for name in ("3.nonce", "3.node-7.nonce", "12.nonce", "12.node-7.nonce", "3.json"):
        storage.replace(f"leases/{name}", b"x")
    forget_drivers_before(storage, 12)
    assert set(storage.names("leases")) == {"12.nonce", "12.node-7.nonce", "3.json"}


def test_a_node_answers_beside_the_nonce(storage: Storage) -> None:
    storage.replace(nonce_name(3), b"ours")
    assert answer(storage.uri, "ours", 3, "node-7") == fingerprint()
    assert storage.read("leases/3.node-7.nonce") == b"ours"


def _copy_sources(to: Path) -> None:
    root = Path(orchestrator.__file__).parents[1]
    for room in ROOMS:
        shutil.copytree(root / room, to / room)


def test_the_fingerprint_is_of_the_sources(tmp_path: Path) -> None:
    """A copy has the same, whatever else lies beside it; one more comment makes another."""
    code = "from orchestrator.proof import fingerprint; print(fingerprint())"

    def found(where: Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(where)}
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout.strip()

    one, other = tmp_path / "one", tmp_path / "other"
    _copy_sources(one)
    shutil.copytree(one, other)
    (other / "cluster" / "notes.txt").write_text("not of it")
    assert found(one) == found(other)
    with (other / "trainers" / "flops.py").open("a") as file:
        file.write("# another\n")
    assert found(one) != found(other)


RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, LOOPBACK_ONLY: "0"}
RAYLETS = Path(__file__).parents[1] / "faults" / "raylets.py"


def _environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | RAY | more


@contextmanager
def _cluster(*around: str, gpus: int = 0, **more: str) -> Iterator[str]:
    """Address of a cluster of one node beside the driver's, started `around` by something.

    The node claims to have so many GPUs.
    """
    # Below /tmp itself: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        environment = _environment(RAY_TMPDIR=directory, **more)
        command = [*around, sys.executable, "-P", str(RAYLETS)]
        with (
            (Path(directory) / "log").open("w") as log,
            subprocess.Popen(
                command, env=environment, stdin=-1, stdout=-1, stderr=log, text=True
            ) as process,
        ):
            try:
                address = json.loads(process.stdout.readline())["address"]
                print(2, gpus, file=process.stdin, flush=True)
                assert json.loads(process.stdout.readline())["node"]
                yield address
            finally:
                family = psutil.Process(process.pid).children(recursive=True)
                process.stdin.close()
                psutil.wait_procs(family, 15)
                for one in [psutil.Process(process.pid), *family]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()


def _run(sweep: Path, project: Path, head: str, **more: str) -> tuple[int, str]:
    """Exit code and errors of `isoflop run` on the cluster."""
    command = [sys.executable, "-P", "-m", "orchestrator", "run", str(sweep)]
    command += ["--project", str(project), "--address", head]
    done = subprocess.run(
        command, env=_environment(**more), capture_output=True, text=True, timeout=400, check=False
    )
    assert list(project.glob("ledger/*")) == []
    assert list(project.glob("leases/*.nonce")) == []
    return done.returncode, done.stderr


def _may_mount() -> bool:
    command = ["unshare", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="mount namespaces are not permitted here")
def test_a_node_that_sees_another_directory_is_named(
    tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    """Where the driver sees the project, the node sees an empty disk."""
    project = tmp_path / "shared" / "project"
    project.parent.mkdir()
    hide = f'mount -t tmpfs none "{project.parent}" && exec "$@"'
    with _cluster("unshare", "--mount", "sh", "-c", hide, "sh") as address:
        code, said = _run(sweep_file(), project, address)
    assert code == 2
    assert said.splitlines()[-1].startswith("isoflop: node 127.0.0.1 ")
    assert f"does not see the same {project} as the driver: put the project on storage" in said


@pytest.mark.slow
def test_a_node_with_another_isoflop_is_named_and_tokens_are_compared(
    tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    _copy_sources(tmp_path)
    with (tmp_path / "trainers" / "flops.py").open("a") as file:
        file.write("# another\n")
    project = tmp_path / "project"
    with _cluster(PYTHONPATH=str(tmp_path)) as address:
        code, said = _run(sweep_file(), project, address)
        assert code == 2
        assert "isoflop: node 127.0.0.1 has another isoflop than this machine: install" in said
        code, said = _run(sweep_file(), project, address, RAY_AUTH_TOKEN="1" * 64)
        assert code == 2
        assert f"isoflop: the Ray cluster at {address} refuses the token: set RAY" in said
        nothing = {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
        code, said = _run(sweep_file(), project, address, **nothing)
        assert code == 2
        assert f"isoflop: the Ray cluster at {address} is to be shown a token" in said


GOOD = Check.ok("driver", "driver 580.65.06 (CUDA up to 13.0), torch 2.13.0 for CUDA 13.0")
OLD = Check.failure("driver", "torch sees no GPU: driver 550", "install driver 580 or newer")
WORKS = Check.ok("GPU 0", "NVIDIA X: a matrix product and a compilation work")
BROKEN = Check.failure("GPU 1", "NVIDIA X: a matrix product fails", "hide it")
EAGER = Check.warning("GPU 0", "NVIDIA X: compiling fails", "install a C compiler")


@pytest.fixture
def nodes_that(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a cluster whose nodes answer so."""

    def make(*answers: object) -> None:
        there = [
            {"NodeID": str(i), "NodeManagerAddress": f"10.0.0.{i}", "Alive": True}
            | {"Resources": {"GPU": 2.0}}
            for i in range(len(answers))
        ]
        monkeypatch.setattr(proof, "nodes", lambda: there)
        asked = list(zip(there, answers, strict=True))
        monkeypatch.setattr(proof, "ask_nodes", lambda *_: asked)

    return make


def test_what_nodes_say_of_their_gpus_is_a_line(nodes_that: Callable[..., None]) -> None:
    nodes_that([GOOD, WORKS], [GOOD, WORKS])
    assert prove_gpus("torch") == [f"GPUs of 2 nodes: {GOOD.value}; {WORKS.value}"]
    nodes_that([GOOD])  # all that can be told for a program of one's own
    assert prove_gpus("driver") == [f"GPUs of 1 node: {GOOD.value}"]
    nodes_that()  # an autoscaler brings them later
    assert prove_gpus("torch") == []


def test_a_sweep_begins_if_some_gpu_works_and_says_which_do_not(
    nodes_that: Callable[..., None],
) -> None:
    nodes_that([GOOD, WORKS, BROKEN], [OLD], [GOOD, EAGER], TimeoutError("has not answered"))
    first, *others = prove_gpus("torch")
    assert first == f"GPUs of 1 node: {GOOD.value}; {WORKS.value}"
    assert "node 10.0.0.0: NVIDIA X: a matrix product fails: hide it" in others
    assert "node 10.0.0.2: NVIDIA X: compiling fails: install a C compiler" in others
    assert "node 10.0.0.1: torch sees no GPU: driver 550: install driver 580 or newer" in others
    assert "node 10.0.0.3: has not answered" in others


@pytest.mark.parametrize("checks", [[OLD], [GOOD, BROKEN]])
def test_a_sweep_does_not_begin_where_no_gpu_works(
    nodes_that: Callable[..., None], checks: list[Check]
) -> None:
    nodes_that(checks, checks)
    with pytest.raises(InputError, match=r"none of 2 nodes has a GPU that works; node 10\.0\.0\.0"):
        prove_gpus("torch")


PRETRAIN = """
name = "test"
recipe = "llama-adamw"  # in bf16: small trials in fp32 are placed on cores
budgets = [1e10]
sizes = 3
span = 4
[corpus]
kind = "markov"
tokens = 2000000
symbols = 16
[shapes]
depth = 2
heads = 2
context = 64
"""
"""In bf16, of which trials are placed on GPUs however small they are."""
COMMAND = """
name = "test"
trainer = "command"
corpus = { kind = "declared", name = "x", version = "1", vocabulary = 50, tokens = 9_000_000_000 }
budgets = [1e9]
sizes = 3
span = 4
[command]
run = ["{python}", "-c", "1"]
env = { TRIAL = "{width} {steps} {batch_tokens}" }
gpus = 1.0
"""


NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = 0; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
    __builtin_strcpy(name, "NVIDIA A100-SXM4-40GB");
    return 0;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build a library of NVIDIA's")
def test_a_laptop_whose_gpu_torch_cannot_use_trains_on_cores_as_the_message_says(
    tmp_path: Path,
) -> None:
    """NVIDIA's library tells Ray of a GPU that no driver and no torch here can use."""
    (tmp_path / "nvml.c").write_text(NVML)
    build = ["gcc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(build, cwd=tmp_path, check=True)
    # A recipe in bf16, which goes to no core beside a GPU.
    (tmp_path / "a.toml").write_text(PRETRAIN.replace("mini", "llama-adamw"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-P", "-m", "orchestrator", "run", str(tmp_path / "a.toml")]
    command += ["--project", str(tmp_path / "project")]
    run = partial(subprocess.run, command, capture_output=True, text=True, timeout=600, check=False)
    refused = run(env=environment)
    assert refused.returncode == 2
    assert "torch sees no GPU" in refused.stderr
    assert "train on cores: CUDA_VISIBLE_DEVICES= isoflop run" in refused.stderr
    run(env=environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert any((tmp_path / "project" / "ledger").iterdir())


@pytest.mark.slow
def test_gpus_that_are_none_are_refused_before_anything_trains(tmp_path: Path) -> None:
    """Ray believes whoever starts it; torch then trains on the CPU, and raises nothing."""
    with _cluster(gpus=2) as address:
        for name, sweep, driver in (("a", PRETRAIN, False), ("b", COMMAND, True)):
            path = tmp_path / f"{name}.toml"
            path.write_text(sweep)
            code, said = _run(path, tmp_path / name, address)
            assert code == 2
            last = said.splitlines()[-1]
            assert last.startswith("isoflop: node 127.0.0.1")
            assert ("no GPU answers" if driver else "torch sees no GPU") in last
            assert driver or f"torch {version('torch')}" in last
            assert "driver" in last
            assert "on cores" not in last
