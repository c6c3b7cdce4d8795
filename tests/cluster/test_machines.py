"""Clusters as Ray tells of them."""

import pytest

from cluster.machines import (
    UNKNOWN_GPU,
    Cluster,
    Node,
    as_told,
    cluster_from_ray,
    uniform,
    unknown_types,
)
from cluster.nvidia import GpuReport
from trainers.gpus import gpu_type


def _ray_node(name: str, *, alive: bool = True, **resources: float) -> dict:
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {f"node:{name}": 1.0, "object_store_memory": 1e9, **resources},
    }


def test_a_cluster_is_the_living_nodes_of_ray() -> None:
    found = cluster_from_ray(
        [
            _ray_node("b", CPU=96.0, GPU=8.0, memory=1e12, **{"accelerator_type:H100": 1.0}),
            _ray_node("a", CPU=4.0, memory=16e9),
            _ray_node("dead", alive=False, CPU=96.0, GPU=8.0),
        ]
    )
    assert found.nodes == (
        Node(name="a", cpus=4, memory_bytes=16e9),
        Node(name="b", cpus=96, gpus=8, gpu_type="H100", memory_bytes=1e12),
    )
    assert (found.cpus, found.gpus) == (100, 8)
    assert found.nodes[1].gpu is gpu_type("H100 SXM")
    assert str(found) == "1 node of 4 cores, 1 node of 8 GPUs H100 SXM and 96 cores"


def test_a_head_without_cores_and_gpus_of_unknown_type_are_no_error() -> None:
    found = cluster_from_ray([_ray_node("head"), _ray_node("worker", CPU=2.0, GPU=1.0)])
    assert found.nodes[0].cpus == 0
    assert found.nodes[1].gpu == UNKNOWN_GPU
    assert (UNKNOWN_GPU.memory_bytes, UNKNOWN_GPU.fp32_flops) == (16e9, 8.1e12)
    assert "1 node of 1 GPU of unknown type (taken for a T4) and 2 cores" in str(found)
    assert str(cluster_from_ray([])) == "no nodes"


@pytest.mark.parametrize(("gpus", "cpus"), [(8, 64), (1, 8), (0, 1)])
def test_a_planned_node_has_a_core_for_every_share_of_its_gpus(gpus: int, cpus: int) -> None:
    assert uniform(gpus=gpus).cpus == cpus


def _reported(name: str, memory: float | None, **more: bool) -> Node:
    nodes = [_ray_node("a", CPU=8.0, GPU=1.0, **{"accelerator_type:A100": 1.0})]
    report = GpuReport(name=name, memory_bytes=memory, **more)
    return cluster_from_ray(nodes, {"a": report}).nodes[0]


def test_a_node_knows_its_gpus_better_than_ray() -> None:
    """Ray says A100; the node, that it has 80 GB, MPS, and takes one process a GPU."""
    node = _reported("NVIDIA A100-SXM4-80GB", 85.9e9, mps=True, exclusive=True)
    assert node.gpu is gpu_type("A100 80GB")
    assert (node.gpu_type, node.reported, node.mps, node.exclusive) == ("A100", True, True, True)
    assert str(Cluster(nodes=(node,))) == (
        "1 node of 1 GPU A100 80GB (MPS, one process each) and 8 cores"
    )


def test_a_person_is_believed_where_the_node_says_nothing() -> None:
    silent = Node(name="a", cpus=8, gpus=1, gpu_type="A100")
    reporting = _reported("NVIDIA A100-SXM4-40GB", 42.9e9)
    nameless = Node(name="c", cpus=8, gpus=1)
    found = as_told(Cluster(nodes=(silent, reporting, nameless)), "A100 80GB")
    assert [node.gpu.name for node in found.nodes] == ["A100 80GB", "A100 40GB", "A100 80GB"]
    told = as_told(Cluster(nodes=(nameless, silent)), None, 48e9)
    assert [node.gpu.memory_bytes for node in told.nodes] == [48e9, 40e9]
    less = as_told(Cluster(nodes=(silent,)), "A100", 20e9)
    assert less.nodes[0].gpu.memory_bytes == 20e9


def test_an_unknown_gpu_is_said_to_be_one_with_what_is_assumed_and_what_to_set() -> None:
    assert unknown_types(uniform(gpus=8, gpu_type="H100")) is None
    assert unknown_types(uniform(cpus=8)) is None
    nameless = unknown_types(uniform(gpus=8)) or ""
    for said in ("speed of a T4", "16 GB of memory", "[cluster] gpu to", "gpu_memory"):
        assert said in nameless
    named = unknown_types(Cluster(nodes=(_reported("NVIDIA X1", 48e9),))) or ""
    assert "NVIDIA X1" in named
    assert "memory" not in named  # it is known
    assert _reported("NVIDIA X1", 48e9).gpu.memory_bytes == 48e9
    told = as_told(Cluster(nodes=(Node(name="a", cpus=8, gpus=1),)), "X1", 48e9)
    assert "X1" in (unknown_types(told) or "")
    assert "1 GPU X1 (taken for a T4, 48 GB each)" in str(told)
