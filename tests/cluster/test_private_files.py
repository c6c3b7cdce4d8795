"""What the manifests and the docs do with shells: the private directory, the token's file.

Their own lines are run, as root would find them on a shared machine: with another user about.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.connection import LONGEST_SOCKET, SOCKET_PATH_BYTES
from tests.cluster.attacks import READ, WRITE, is_refused
from tests.strangers import STRANGER, needs_stranger

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SBATCH = (ROOT / "cluster/slurm/sweep.sbatch").read_text()
LAUNCHERS = {p.stem: yaml.safe_load(p.read_text()) for p in ROOT.glob("cluster/launcher/*.yaml")}
RAYJOB = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.yaml").read_text())
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def _installs() -> list[str]:
    """The shell lines of the pods' init containers."""
    return [
        init["args"][0]
        for group in GROUPS
        for init in group["template"]["spec"]["initContainers"]
        if init["command"] == ["bash", "-c"]
    ]


def _private_lines() -> dict[str, str]:
    """By manifest and part, the shell line that makes the private directory."""
    lines = {
        f"{name} {part}": next(
            c for c in launcher[f"{part}_start_ray_commands"] if c.startswith("mkdir")
        )
        for name, launcher in LAUNCHERS.items()
        for part in ("head", "worker")
    }
    named, body = re.search(
        r"^(RAY_TMPDIR=.*?)  #.*? bash -c '(.*?)'$", SBATCH, re.M | re.S
    ).groups()
    lines["slurm"] = f"export {named}; {body}"
    (lines["kuberay"],) = {text.split(" && pip ")[0] for text in _installs()}
    return lines


LINES = _private_lines()


def _directory(mode: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(mode)
        yield Path(name)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory such as /tmp, in which every user may make things."""
    yield from _directory(0o1777)


def _make(line: str, shared: Path, **user: Any) -> subprocess.CompletedProcess[str]:
    """Run a manifest's line with `shared` in the place of /tmp."""
    assert line.count("/tmp/")
    return subprocess.run(
        ["bash", "-c", line.replace("/tmp/isoflop/", "/tmp/").replace("/tmp/", f"{shared}/")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        umask=0o022,
        **user,
    )


def test_every_place_where_ray_starts_makes_a_private_directory_first() -> None:
    assert len(LINES) == 2 * len(LAUNCHERS) + 2 == 8
    for launcher in LAUNCHERS.values():
        for part in ("head", "worker"):
            commands = launcher[f"{part}_start_ray_commands"]
            (made,) = [i for i, command in enumerate(commands) if command.startswith("mkdir")]
            (started,) = [i for i, command in enumerate(commands) if "ray start" in command]
            assert made < started
            assert "--temp-dir=/tmp/isoflop-$(id -u)/ray" in commands[started]
    assert '--temp-dir="$RAY_TMPDIR/ray"' in SBATCH
    for group in GROUPS:
        assert group["rayStartParams"]["temp-dir"] == "/tmp/isoflop/private/ray"
        spec = group["template"]["spec"]
        for container in (*spec["initContainers"], *spec["containers"]):
            assert {"name": "private", "mountPath": "/tmp/isoflop"} in container["volumeMounts"]
        assert {"name": "private", "emptyDir": {}} in spec["volumes"]
        assert not {"hostPID", "hostIPC", "hostNetwork", "shareProcessNamespace"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec["volumes"])


@pytest.mark.parametrize("name", LINES)
def test_rays_sockets_have_short_enough_paths(name: str) -> None:
    (place,) = set(re.findall(r"/tmp/isoflop(?:-\$\(id -u\)|/private)", LINES[name]))
    longest = place.replace("$(id -u)", str(2**32 - 2)) + f"/ray/{LONGEST_SOCKET}"
    assert len(longest) <= SOCKET_PATH_BYTES


@pytest.mark.parametrize("name", LINES)
def test_the_private_directory_is_made_and_may_be_there_already(shared: Path, name: str) -> None:
    for _ in range(2):
        ended = _make(LINES[name], shared)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        (made,) = shared.iterdir()
        assert stat.S_IMODE(made.lstat().st_mode) == 0o700


@needs_stranger
@pytest.mark.parametrize("name", LINES)
def test_nobody_else_sees_or_changes_what_ray_puts_there(shared: Path, name: str) -> None:
    assert _make(LINES[name], shared).returncode == 0
    (private,) = shared.iterdir()
    session = private / "ray/session"
    session.mkdir(parents=True)
    for directory in (session.parent, session):  # as Ray does
        directory.chmod(0o777)
    (session / "job.py").write_text("ours")
    (session / "job.py").chmod(0o666)
    assert is_refused(WRITE, session / "job.py")
    assert (session / "job.py").read_text() == "ours"
    private.chmod(0o755)  # the attack is a real one: without the private directory it succeeds
    assert not is_refused(WRITE, session / "job.py")
    assert (session / "job.py").read_text() == "theirs"


@needs_stranger
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("trap", ["directory", "open", "link", "file"])
def test_what_somebody_else_made_in_its_place_is_refused(
    shared: Path, name: str, trap: str
) -> None:
    """The stranger's or an open one, a link to a directory that is private, or no directory."""
    assert _make(LINES[name], shared).returncode == 0
    (private,) = shared.iterdir()
    private.rmdir()
    if trap == "file":
        private.touch(mode=0o700)
    elif trap == "link":
        (shared / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(shared / "elsewhere")
    else:
        private.mkdir(mode=0o700)
        private.chmod(0o777 if trap == "open" else 0o700)
    if trap == "directory":
        os.chown(private, STRANGER, STRANGER)
    ended = _make(LINES[name], shared)
    assert ended.returncode == 1
    assert f"{private}" in ended.stderr
    assert "is not a directory of mode 700 that this user made" in ended.stderr


@needs_stranger
@pytest.mark.parametrize("name", LINES)
def test_a_plain_user_is_refused_the_directory_that_root_made(shared: Path, name: str) -> None:
    as_user = {"user": STRANGER, "group": STRANGER, "extra_groups": []}
    assert _make(LINES[name], shared, **as_user).returncode == 0
    (private,) = shared.iterdir()
    assert (private.stat().st_uid, stat.S_IMODE(private.stat().st_mode)) == (STRANGER, 0o700)
    os.chown(private, 0, 0)
    assert _make(LINES[name], shared, **as_user).returncode == 1


# The token's file.


def _token_lines() -> dict[str, str]:
    """By manifest, the shell lines that make the token's file or tighten its mode."""
    (slurm,) = re.findall(r"^TOKEN_FILE=.*?chmod 600 [^\n]+$", SBATCH, re.M | re.S)
    lines = {"slurm": f"set -euo pipefail\n{slurm}"}
    for name, launcher in LAUNCHERS.items():
        lines[name] = next(c for c in launcher["setup_commands"] if "chmod" in c)
    docs = (ROOT / "docs/cluster.md").read_text()
    made = re.findall(r"^    (\(umask .*|chmod 600 .*)$", docs, re.M)
    assert len(made) == 2
    lines["docs"] = "\n".join(made)
    return lines


TOKEN_LINES = _token_lines()


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory that others may enter, as many are."""
    yield from _directory(0o755)


def _keep_token(line: str, home: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "-c", line], env=environment, umask=0o022, timeout=300, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr


def _require_private(home: Path) -> None:
    token = home / ".ray/auth_token"
    assert len(token.read_text().strip()) == 64
    assert not token.stat().st_mode & OTHERS
    if os.geteuid() == 0:
        assert is_refused(READ, token)
        token.parent.chmod(0o755)
        assert is_refused(READ, token)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm", "docs"])
def test_a_token_that_ray_makes_is_its_owners_alone(home: Path, name: str) -> None:
    """Ray's own command is run, which by itself leaves the file to the umask."""
    _keep_token(TOKEN_LINES[name], home)
    assert not (home / ".ray").stat().st_mode & OTHERS
    _require_private(home)


@pytest.mark.slow
def test_ray_itself_would_write_a_token_that_all_can_read(home: Path) -> None:
    """The reason for the umask; once this fails, the manifests can do without it."""
    _keep_token("ray get-auth-token --generate > /dev/null", home)
    assert (home / ".ray/auth_token").stat().st_mode & OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOKEN_LINES))
def test_a_loose_token_file_is_tightened(home: Path, name: str) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("0" * 64)
    (home / ".ray/auth_token").chmod(0o644)
    _keep_token(TOKEN_LINES[name], home)
    _require_private(home)


def test_every_shell_line_is_one() -> None:
    lines = [SBATCH, *_installs(), *LINES.values(), *TOKEN_LINES.values()]
    for launcher in LAUNCHERS.values():
        for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
            lines += launcher[key]
    assert len(lines) > 30
    for line in lines:
        ended = subprocess.run(
            ["bash", "-n"], input=line, capture_output=True, text=True, check=False, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (0, ""), line


def test_no_command_shows_a_secret_to_the_process_list() -> None:
    """What stands in a command line is seen by all users of the machine."""
    texts = [path.read_text() for path in ROOT.glob("cluster/*/*.*")]
    for text in (*texts, (ROOT / "docs/cluster.md").read_text()):
        assert "--from-literal" not in text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_kubernetes_token_comes_by_a_pipe_and_has_no_line_end() -> None:
    text = (ROOT / "cluster/kuberay/rayjob.yaml").read_text()
    (made,) = re.findall(r"^#   (openssl .*) \| kubectl create secret .*/dev/stdin$", text, re.M)
    ended = subprocess.run(["bash", "-c", made], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"[0-9a-f]{64}", ended.stdout)
