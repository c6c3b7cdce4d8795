"""Clusters that grow: what is still to come, and what Ray's autoscaler is asked for."""

from typing import Any

import pytest
import ray.autoscaler.sdk

from cluster.machines import Cluster, Node, uniform
from orchestrator.growth import announced, wish

HEAD = Node(name="head", cpus=0)
NAMED = uniform(nodes=3, gpus=8, gpu_type="H100")


def _found(*nodes: Node) -> Cluster:
    return Cluster(nodes=nodes)


@pytest.mark.parametrize(
    ("found", "coming"),
    [
        (_found(HEAD), 3),
        (_found(HEAD, Node(name="x", cpus=32, gpus=8, gpu_type="H100")), 2),
        (_found(HEAD, Node(name="x", cpus=32, gpus=4, gpu_type="H100")), 3),
        (_found(HEAD, Node(name="x", cpus=32, gpus=8, gpu_type="L4")), 3),
        (uniform(nodes=5, gpus=8, gpu_type="H100"), 0),
    ],
    ids=["head alone", "one is there", "one is too small", "one is of another type", "all"],
)
def test_machines_that_are_not_there_yet_are_to_come(found: Cluster, coming: int) -> None:
    there = announced(found, NAMED)
    assert there.nodes[: len(found.nodes)] == found.nodes
    assert len(there.nodes) == len(found.nodes) + coming


def test_a_type_is_known_under_what_ray_calls_it() -> None:
    """Ray names neither memory nor form, and people write as they like."""
    there = _found(Node(name="x", cpus=96, gpus=8, gpu_type="A100"))
    for written in ("A100 80GB", "a100", "A100-40G"):
        named = uniform(gpus=8, gpu_type=written)
        assert announced(there, named) == there
        assert named.nodes[0].gpu_type == "A100"  # by which a trial would ask for it


def test_machines_of_cores_are_those_with_so_many() -> None:
    found = _found(Node(name="head", cpus=2), Node(name="x", cpus=16))
    assert len(announced(found, uniform(nodes=2, cpus=16)).nodes) == 3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Ray's autoscaler was asked for."""
    made: list[Any] = []

    def request_resources(bundles: Any) -> None:
        made.append(bundles)

    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", request_resources)
    return made


def test_machines_are_asked_for_once_and_taken_back_at_the_end(asked: list[Any]) -> None:
    with wish(NAMED) as wished:
        assert asked == [[{"CPU": 8.0, "GPU": 8.0}] * 3]
        for wanted in (True, False, False, True):
            wished.want(wanted)
        assert len(asked) == 3
    assert asked[1:] == [[], asked[0], []]


def test_who_names_no_machines_asks_for_nothing(asked: list[Any]) -> None:
    """Ray keeps one wish a cluster: it may be somebody else's."""
    with wish(None) as wished:
        wished.want(True)
        wished.forget()
    assert asked == []
