"""What the nodes of a running cluster say of their GPUs: each is asked once, by a task on it.

Ray tells a GPU's name without form and memory, and nothing of MPS. A node that does not answer is
taken for what Ray says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.nvidia import GpuReport, gpu_report

PATIENCE_SECONDS = 20.0
"""Longest wait for nodes that are there at the start of a sweep; later ones are not waited for."""


class GpuReports:
    """The answers so far, by the node's id."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}
        """References to the answers that are not there yet."""
        self._seen: set[str] = set()
        self.known: dict[str, GpuReport] = {}

    def update(
        self, nodes: Iterable[Mapping[str, Any]], *, wait: float = 0.0
    ) -> Mapping[str, GpuReport]:
        """Ask the nodes, as `ray.nodes()` has them, that have GPUs and were not asked before.

        Returns what is known after `wait` seconds at most.
        """
        import ray

        for node in nodes:
            if (
                node["Alive"]
                and node["Resources"].get("GPU", 0)
                and node["NodeID"] not in self._seen
            ):
                self._seen.add(node["NodeID"])
                self._asked[node["NodeID"]] = _ask(node["NodeID"])
        if not self._asked:
            return self.known
        references = list(self._asked.values())
        done, _ = ray.wait(references, num_returns=len(references), timeout=wait)
        for node_id in [n for n, reference in self._asked.items() if reference in done]:
            try:
                report = ray.get(self._asked.pop(node_id))
            except ray.exceptions.RayError:  # its node is taken for what Ray says of it
                continue
            if report is not None:
                self.known[node_id] = report
        return self.known


def _ask(node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(gpu_report)
    return task.options(scheduling_strategy=there).remote()
