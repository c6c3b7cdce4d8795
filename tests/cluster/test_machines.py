"""Clusters as Ray tells of them."""

import pytest

from cluster.machines import UNKNOWN_GPU, Node, cluster_from_ray, uniform
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
    assert found.nodes[1].gpu is UNKNOWN_GPU
    assert (UNKNOWN_GPU.memory_bytes, UNKNOWN_GPU.fp32_flops) == (16e9, 8.1e12)
    assert "1 node of 1 GPU of unknown type, taken for a T4, and 2 cores" in str(found)
    assert str(cluster_from_ray([])) == "no nodes"


@pytest.mark.parametrize(("gpus", "cpus"), [(8, 64), (1, 8), (0, 1)])
def test_a_planned_node_has_a_core_for_every_share_of_its_gpus(gpus: int, cpus: int) -> None:
    assert uniform(gpus=gpus).cpus == cpus
