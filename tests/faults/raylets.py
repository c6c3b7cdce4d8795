"""A Ray cluster of several raylets on loopback, as a process of its own: see `conftest.py`.

Reads lines: the CPUs of a node to add, and the GPUs that it claims to have. Says a JSON object for
the head and for each node. Ends the cluster when its input ends.
"""

import json
import os
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE = {"object_store_memory": 80_000_000}


def say(node, **more):
    process = node.all_processes["raylet"][0].process
    print(json.dumps({"pid": process.pid, "node": node.node_id, **more}), flush=True)


def main():
    # No trial runs beside the driver, which would die with its node.
    head = {"num_cpus": 0, "include_dashboard": False, **OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    say(cluster.head_node, address=cluster.address)
    for line in sys.stdin:
        cpus, gpus = (*map(int, line.split()), 0)[:2]
        if gpus:  # numbers that no real GPU has, so that trials see none even where there are some
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(-1 - i) for i in range(gpus))
        say(cluster.add_node(num_cpus=cpus, num_gpus=gpus, **OBJECT_STORE))
    cluster.shutdown()


if __name__ == "__main__":
    main()
