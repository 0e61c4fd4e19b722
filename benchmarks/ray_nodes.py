"""Nodes of a Ray cluster on this machine's loopback, for tests and benchmarks.

Runs in a process of its own: ``python -m benchmarks.ray_nodes [PORT]``. Ray Client connects to
PORT. Prints the cluster's address. Each line on standard input adds a node of that name and is
answered with the process id of its raylet. The cluster ends with standard input.
"""

import os
import select
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray._private.node import Node
from ray.cluster_utils import Cluster

from maskcast.pipeline.cluster.ray_cluster import HEALTH_CHECKS


def add(cluster: Cluster, name: str, **options: object) -> Node:
    """Add a node with one CPU."""
    return cluster.add_node(
        num_cpus=1,
        node_name=name,
        node_ip_address="127.0.0.1",
        object_store_memory=80 << 20,
        include_dashboard=False,
        **options,
    )


def say(text: object) -> None:
    """Print an answer, marked because Ray prints too."""
    sys.stdout.write(f"said {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input ends."""
    cluster = Cluster()
    port = int(sys.argv[1]) if sys.argv[1:] else None
    add(cluster, "head", _system_config=HEALTH_CHECKS, ray_client_server_port=port)
    say(cluster.address)
    nodes = [cluster.head_node]
    while True:
        if select.select([sys.stdin], [], [], 0.1)[0]:
            if not (name := sys.stdin.readline().strip()):
                break
            nodes.append(add(cluster, name))
            say(nodes[-1].all_processes["raylet"][0].process.pid)
        for node in nodes:  # a child that is not reaped would look alive to its workers
            for processes in node.all_processes.values():
                for process in processes:
                    process.process.poll()
    cluster.shutdown()


if __name__ == "__main__":
    main()
