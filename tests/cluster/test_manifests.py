"""The manifests are valid to the letter, and commands in them and in docs/cluster.md exist."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray.autoscaler
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cli import app
from orchestrator.growth import Wish
from orchestrator.spec_running import Checkpoints, ClusterSpec, Limits, Strict

# Importing Ray's command line imports Ray Serve, which warns of its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/cluster.md").read_text()
KUBERAY = ROOT / "cluster/kuberay/rayjob.yaml"
RAYJOB = yaml.safe_load(KUBERAY.read_text())
LAUNCHERS = {p.stem: yaml.safe_load(p.read_text()) for p in ROOT.glob("cluster/launcher/*.yaml")}
SBATCH = ROOT / "cluster/slurm/sweep.sbatch"
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
PODS = [
    CLUSTER["headGroupSpec"]["template"],
    *(g["template"] for g in CLUSTER["workerGroupSpecs"]),
]
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
COMMANDS = [line.split("   #")[0].rstrip("& ") for line in re.findall(r"^    (\S.*)$", DOCS, re.M)]


def parse(command: str) -> dict[str, Any]:
    """Have a command line of isoflop, Ray or MLflow parsed by its own parser."""
    program, verb, *arguments = shlex.split(re.sub(r" > \S+$", "", command))
    if program == "isoflop":
        group = typer.main.get_command(app)
    elif program == "ray":
        from ray.scripts.scripts import cli as group
    else:
        from mlflow.cli import cli as group
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    return group.commands[verb].make_context(verb, arguments).params


def strict(schema: Any) -> Any:
    """The schema, refusing fields that it does not know, as the API server with `--validate`."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(made.get("properties"), dict) and not free:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def rayjob_schema(kuberay_rayjob_schema: Path) -> Any:
    return strict(json.loads(kuberay_rayjob_schema.read_text()))


def test_the_rayjob_is_valid(rayjob_schema: Any) -> None:
    jsonschema.validate(RAYJOB, rayjob_schema)


@pytest.mark.parametrize(
    "path",
    [
        "spec",
        "spec.rayClusterSpec",
        "spec.rayClusterSpec.authOptions",
        "spec.rayClusterSpec.autoscalerOptions",
        "spec.rayClusterSpec.headGroupSpec.template.spec",
        "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0",
        "spec.rayClusterSpec.workerGroupSpecs.1",
        "spec.rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resources",
        "spec.rayClusterSpec.workerGroupSpecs.1.template.spec.tolerations.0",
        "spec.rayClusterSpec.workerGroupSpecs.1.template.spec.affinity.nodeAffinity",
    ],
)
def test_a_misspelt_field_anywhere_in_the_rayjob_would_be_noticed(
    rayjob_schema: Any, path: str
) -> None:
    broken = copy.deepcopy(RAYJOB)
    place = broken
    for name in path.split("."):
        place = place[int(name) if name.isdigit() else name]
    place["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(broken, rayjob_schema)


def test_the_docs_volume_fits_every_pod(rayjob_schema: Any) -> None:
    (fragment,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS, re.S))
    made = copy.deepcopy(RAYJOB)
    for pod in _pods(made):
        pod["spec"]["volumes"] += fragment["volumes"]
        pod["spec"]["containers"][0]["volumeMounts"] += fragment["containers"][0]["volumeMounts"]
    jsonschema.validate(made, rayjob_schema)


def test_the_docs_network_policy_is_one(rayjob_schema: Any) -> None:
    policy = yaml.safe_load(re.search(r"`(networkPolicy: .*?)`", DOCS)[1])
    made = copy.deepcopy(RAYJOB)
    made["spec"]["rayClusterSpec"] |= policy
    jsonschema.validate(made, rayjob_schema)


def _pods(rayjob: dict) -> list[dict]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [
        cluster["headGroupSpec"]["template"],
        *(g["template"] for g in cluster["workerGroupSpecs"]),
    ]


def test_pods_bound_what_they_use_and_mount_only_what_they_have() -> None:
    for pod in PODS:
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec["initContainers"], *spec["containers"]]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_rayjob_starts_small_never_retries_and_cleans_up() -> None:
    assert CLUSTER["enableInTreeAutoscaling"]
    assert all(
        group["minReplicas"] == 0 < group["maxReplicas"] for group in CLUSTER["workerGroupSpecs"]
    )
    spec = RAYJOB["spec"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (0, True)
    assert CLUSTER["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_spot_nodes_are_asked_for_first_and_never_hold_the_head() -> None:
    groups = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
    assert groups["gpu-spot"]["priority"] > groups["gpu"]["priority"]
    (head,) = _node_terms(PODS[0])
    spot = [term["key"] for one in _node_terms(groups["gpu-spot"]["template"]) for term in one]
    assert {term["key"] for term in head} == set(spot)
    assert {term["operator"] for term in head} == {"NotIn", "DoesNotExist"}


def _node_terms(pod: dict) -> list[list[dict]]:
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = pod["spec"]["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"]
    return [term["matchExpressions"] for term in terms]


def test_everything_runs_the_pinned_ray() -> None:
    assert CLUSTER["rayVersion"] == RAY
    containers = [
        c for pod in PODS for c in pod["spec"]["containers"] + pod["spec"]["initContainers"]
    ]
    images = [container["image"] for container in containers]
    images += [
        launcher["docker"]["image"] for launcher in LAUNCHERS.values() if "docker" in launcher
    ]
    images += re.findall(r"FROM (\S+)", DOCS)
    assert {image.split("-")[0] for image in images} == {f"rayproject/ray:{RAY}"}
    for path in (*(ROOT / "cluster").glob("launcher/[ag]*.yaml"), KUBERAY):
        assert "@sha256:" in path.read_text()  # how to hold the content, too
    pins = re.findall(r"ray\[\S*\]==([0-9.]+)", str(LAUNCHERS))
    assert pins == [RAY]


def test_what_is_installed_is_this_version_with_extras_that_exist() -> None:
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [json.dumps(RAYJOB), json.dumps(LAUNCHERS), DOCS]
    wheels = [w for text in texts for w in re.findall(r"isoflop-([0-9.]+)-py3-none-any.whl", text)]
    assert set(wheels) == {made["version"]}
    found = [e for text in texts for e in re.findall(r"(?:whl|\'\.)\[([\w,]+)\]", text)]
    extras = {extra for names in found for extra in names.split(",")}
    assert {"s3", "gcs", "text"} == extras <= set(made["optional-dependencies"])
    assert all("text" in names.split(",") for names in found)  # the docs' sweep reads Hugging Face


def _pins(path: str) -> dict[str, str]:
    """Versions by normalised name, of a file of constraints or hashes."""
    lines = (ROOT / path).read_text().splitlines()
    pairs = [line.split()[0].split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_every_install_of_a_cluster_is_constrained() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "cluster").glob("[kl]*/*.yaml")}
    for name, text in texts.items():
        flat = re.sub(r"\s+", " ", re.sub(r"^\s*#.*$", "", text, flags=re.M))
        installs = re.findall(r"pip install .*?whl", flat)
        assert len(installs) == flat.count("pip install ") >= 1
        for command in installs:
            assert re.search(r" -c \S*constraints\.txt ", command), (name, command)
    for launcher in LAUNCHERS.values():
        assert "constraints.txt" in launcher["file_mounts"].values()
    assert "--from-file=constraints.txt" in texts["rayjob.yaml"]
    assert re.search(r"^RUN pip install -c /tmp/constraints.txt", DOCS.replace("    ", ""), re.M)


def test_the_lock_has_a_hash_for_every_package_and_the_versions_of_the_constraints() -> None:
    pins, locked = _pins("constraints.txt"), _pins("requirements.lock")
    assert locked.items() <= pins.items()
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = made["dependencies"] + [
        item for extra in ("s3", "gcs", "text") for item in made["optional-dependencies"][extra]
    ]
    names = {re.match(r"[\w-]+", item)[0].lower() for item in wanted}
    assert names <= locked.keys()
    lines = (ROOT / "requirements.lock").read_text().split("\n\n")[1].splitlines()
    assert len(lines) == len(locked) > 100
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_google_workers_reach_the_bucket_and_nothing_else() -> None:
    """Trials run programs of others on them; only the head may start machines."""
    types = copy.deepcopy(LAUNCHERS["gcp"]["available_node_types"])
    (head,) = types.pop("head")["node_config"]["serviceAccounts"]
    for kind in types.values():
        (worker,) = kind["node_config"]["serviceAccounts"]
        assert worker["email"] != head["email"]
        assert worker["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]
    name = worker["email"].split("@")[0]
    assert f"gcloud iam service-accounts create {name}" in DOCS
    (granted,) = re.findall(rf"gcloud (.*serviceAccount:{name}@.*)", DOCS)
    assert granted.startswith("storage buckets add-iam-policy-binding gs://")  # of no project
    assert granted.endswith("--role=roles/storage.objectUser")


def test_the_entrypoint_of_the_rayjob_is_a_command_that_exists() -> None:
    assert RAYJOB["spec"]["entrypoint"].startswith("/opt/isoflop/bin/isoflop ")
    parsed = parse(RAYJOB["spec"]["entrypoint"].removeprefix("/opt/isoflop/bin/"))
    assert parsed["address"] == "auto"


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_a_launcher_file_is_valid(name: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(LAUNCHERS[name], schema)
    prepared = prepare_config(copy.deepcopy(LAUNCHERS[name]))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate({**LAUNCHERS[name], "misspelt": 1}, schema)


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_a_launched_ray_asks_for_its_token_and_keeps_its_dashboard_to_itself(name: str) -> None:
    launcher = LAUNCHERS[name]
    assert "~/.ray/auth_token" in launcher["file_mounts"].values()
    for part in ("head", "worker"):
        shell = "; ".join(launcher[f"{part}_start_ray_commands"])
        assert "RAY_AUTH_MODE=token" in shell
        started = re.search(r"ray start .*", shell)[0].replace("$RAY_HEAD_IP", "10.0.0.1")
        parsed = parse(started.replace("$(id -u)", "1000"))
        assert parsed["head"] == (part == "head")
        assert parsed["dashboard_host"] in ("127.0.0.1", "localhost")
        assert parsed["disable_usage_stats"]


def test_a_launcher_can_have_all_the_machines_that_it_names() -> None:
    for name in ("aws", "gcp"):
        types = LAUNCHERS[name]["available_node_types"].values()
        assert LAUNCHERS[name]["max_workers"] == sum(kind["max_workers"] for kind in types)
    local = prepare_config(copy.deepcopy(LAUNCHERS["onpremise"]))
    (kind,) = local["available_node_types"].values()
    assert kind["min_workers"] == local["max_workers"] == len(local["provider"]["worker_ips"])


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which SLURM's commands are played, and `ray` notes what it is told."""
    played = {
        "scontrol": "seq -f node%g 20000",  # more than a pipe holds: who hears one line stops it
        "hostname": "echo 10.0.0.1 172.17.0.1",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "nvidia-cuda-mps-control": '[[ $1 == -d ]] || exec cat > "$HOME/quit"\n'
        'stat -c "%a" "$CUDA_MPS_PIPE_DIRECTORY" > "$HOME/mps"\n'
        'touch "$CUDA_MPS_PIPE_DIRECTORY/control"',
        "ray": f'[[ $1 == symmetric-run ]] || exit 0; printf "%s\\n" "$@" > {tmp_path}/told',
        # The directory of this machine's own is left alone.
        "mkdir": f'[[ $* != *-mps-* ]] || exec {shutil.which("mkdir")} "$@"',
        "stat": f'[[ $* != *-mps-* ]] || exec {shutil.which("stat")} "$@"\n'
        'echo "$(id -u) 700 directory"',
    }
    for name, script in played.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "isoflop/bin").mkdir(parents=True)
    (tmp_path / "isoflop/bin/activate").touch()
    job = f"test-{uuid.uuid4().hex}"
    yield {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_ID": job,
    }
    if (pipes := Path(f"/tmp/isoflop-mps-{job}")).exists():
        pipes.rmdir()


def test_the_batch_script_runs_a_sweep_on_the_first_node(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    subprocess.run(["bash", SBATCH, "sweep.toml"], env=slurm, check=True, timeout=60)
    told = (tmp_path / "told").read_text().splitlines()
    options, entrypoint = told[: told.index("--")], told[told.index("--") + 1 :]
    parsed = parse(shlex.join(["ray", *options]))
    assert parsed["address"] == "10.0.0.1:6379"
    assert parsed["min_nodes"] == 2
    # What symmetric-run does not know itself it hands to `ray start`.
    started = parse(shlex.join(["ray", "start", *parsed["ray_args_and_entrypoint"]]))
    assert started["num_cpus"] == 64
    run = parse(shlex.join(entrypoint[entrypoint.index("isoflop") :]))
    assert (str(run["spec"]), run["address"]) == ("sweep.toml", "10.0.0.1:6379")
    assert str(run["project"]).startswith(slurm["HOME"])


def test_the_batch_script_starts_mps_in_a_directory_of_its_own(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """It goes with the job. One that others can enter is left alone, and MPS is done without."""
    pipes, noted = Path(f"/tmp/isoflop-mps-{slurm['SLURM_JOB_ID']}"), tmp_path / "pipes"
    script = (tmp_path / "ray").read_text() + f'echo "$CUDA_MPS_PIPE_DIRECTORY" > {noted}\n'
    (tmp_path / "ray").write_text(script)
    run = partial(subprocess.run, ["bash", SBATCH, "sweep.toml"], env=slurm, timeout=60)
    run = partial(run, check=True, stderr=-1, text=True)
    for requeued in (False, True):
        if requeued:  # the job was killed, and has the same number
            pipes.mkdir(mode=0o700)
        assert "no MPS" not in run().stderr
        assert (tmp_path / "mps").read_text() == "700\n"
        assert noted.read_text() == f"{pipes}\n"
        assert (tmp_path / "quit").read_text() == "quit\n"
        assert not pipes.exists()
        (tmp_path / "mps").unlink()
    pipes.mkdir()
    pipes.chmod(0o755)
    assert "no MPS: trials that share a GPU take turns" in run().stderr
    assert pipes.exists()
    assert not (tmp_path / "mps").exists()
    assert noted.read_text() == "\n"
    (tmp_path / "ray").write_text("#!/bin/bash\n[[ $1 != symmetric-run ]] || exit 124\n")
    pipes.chmod(0o700)
    assert run(check=False).returncode == 124  # the time was up
    assert not pipes.exists()


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
@pytest.mark.parametrize("there", [True, False])
def test_a_launched_worker_starts_mps_and_then_ray_with_or_without_it(
    name: str, there: bool, tmp_path: Path
) -> None:
    """Neither a machine without the program nor a daemon that runs already is in the way."""
    for program in ("id", "mkdir", "stat", "bash"):
        (tmp_path / program).symlink_to(shutil.which(program))
    user = f"test-{uuid.uuid4().hex}"
    (tmp_path / "id").unlink()
    played = {"id": f"echo {user}", "ray": 'echo "ray $CUDA_MPS_PIPE_DIRECTORY"'}
    if there:
        played["nvidia-cuda-mps-control"] = 'echo "mps $1 $CUDA_MPS_PIPE_DIRECTORY"; exit 1'
    for program, script in played.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    command = LAUNCHERS[name]["worker_start_ray_commands"][-1]
    pipes = Path(f"/tmp/isoflop-mps-{user}")
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            env={"PATH": str(tmp_path), "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        if pipes.exists():
            pipes.rmdir()
    where = f" {pipes}" if name == "onpremise" else " "
    expected = [f"mps -d{where}"] * there + [f"ray{where}"]
    assert done.stdout.splitlines() == expected


def test_a_launched_worker_starts_no_mps_where_others_have_made_its_directory(
    tmp_path: Path,
) -> None:
    """Its pipes would lie in NVIDIA's own directory, in which everybody may write."""
    user = f"test-{uuid.uuid4().hex}"
    played = {"id": f"echo {user}", "ray": "echo ray", "nvidia-cuda-mps-control": "echo mps"}
    for program, script in played.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    pipes = Path(f"/tmp/isoflop-mps-{user}")
    pipes.mkdir()
    try:
        pipes.chmod(0o777)
        done = subprocess.run(
            ["bash", "-c", LAUNCHERS["onpremise"]["worker_start_ray_commands"][-1]],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "RAY_HEAD_IP": "x"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        pipes.rmdir()
    assert done.stdout == "ray\n"


def test_pods_with_gpus_start_mps_and_run_without_it_too(tmp_path: Path) -> None:
    workers = [c for pod in PODS[1:] for c in pod["spec"]["containers"]]
    assert len(workers) == 2
    for container in workers:
        command = container["lifecycle"]["postStart"]["exec"]["command"]
        assert "nvidia-cuda-mps-control -d" in command[-1]
        subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, timeout=60, check=True)


def test_the_batch_script_says_what_it_lacks(slurm: dict[str, str]) -> None:
    ended = subprocess.run(
        ["bash", SBATCH], env=slurm, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode != 0
    assert "sbatch sweep.sbatch SWEEP.toml" in ended.stderr


OURS = ("isoflop ", "ray ", "mlflow ")


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith(OURS)])
def test_the_commands_of_the_docs_exist(command: str) -> None:
    assert parse(command)


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`isoflop (\w+)", DOCS))))
def test_the_verbs_that_the_docs_mention_exist(verb: str) -> None:
    assert verb in typer.main.get_command(app).commands


def test_the_docs_have_commands_and_their_files_exist() -> None:
    ours = [line for line in COMMANDS if line.startswith(OURS)]
    assert len(ours) >= 15
    named = re.findall(r"\]\(([^)#:]+)\)", DOCS)
    assert len(named) >= 5
    for target in named:
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"(?:examples|cluster)/[\w/]+\.\w+", DOCS):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("table", "model"),
    [("limits", Limits), ("checkpoints", Checkpoints), ("cluster", ClusterSpec)],
)
def test_the_docs_have_every_key_of_a_table_with_its_default(
    table: str, model: type[Strict]
) -> None:
    """And no other; a default is what a person would write into the sweep file for it."""
    text = DOCS.split(f"\n`[{table}]`:")[1].split("\n`[")[0].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (–|`.+?`) \| \S.* \|$", text, re.MULTILINE)
    told = {key: cell.strip("`") for key, cell in rows}
    written = "\n".join(f"{key} = {cell}" for key, cell in told.items() if cell != "–")
    defaults = {key: field.default for key, field in model.model_fields.items()}
    assert {**dict.fromkeys(told), **tomllib.loads(written)} == defaults


@pytest.mark.parametrize("text", ["docs", "example"])
def test_the_machines_that_a_sweep_names_are_those_of_the_manifest(text: str) -> None:
    (docs,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    example = (ROOT / "examples/cluster.toml").read_text()
    told = tomllib.loads({"docs": docs, "example": example}[text])["cluster"]
    spec = ClusterSpec.model_validate(told)
    machines = spec.cluster()
    assert spec.autoscaling
    assert machines is not None
    groups = CLUSTER["workerGroupSpecs"]
    assert len(machines.nodes) <= sum(group["maxReplicas"] for group in groups)
    for group in groups:
        has = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for bundle in Wish(machines)._bundles:
            assert bundle["GPU"] == float(has["nvidia.com/gpu"])
            assert bundle["CPU"] <= float(has["cpu"])


def test_the_manifests_are_in_the_package() -> None:
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = made["package-data"]["cluster"]
    shipped = {path for pattern in patterns for path in (ROOT / "cluster").glob(pattern)}
    folders = [ROOT / "cluster" / name for name in ("kuberay", "launcher", "slurm")]
    assert shipped == {path for folder in folders for path in folder.iterdir()}
