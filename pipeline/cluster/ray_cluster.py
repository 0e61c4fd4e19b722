"""RayCluster: the nodes and actors of a Ray cluster, and calls to them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import warnings
from contextlib import suppress
from typing import Any, Self

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.worker import Worker
from maskcast.pipeline.control.messages import NodeReport
from maskcast.pipeline.packages import check_installed
from maskcast.pipeline.url import shorten

LOCAL = "local"
"""The address that starts a cluster on this machine."""

_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's name for "one machine": every port is bound to loopback only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""Settings with which a cluster that is started here detects a dead node within seconds;
docs/cluster.md has the variables for ``ray start``."""

_OBJECT_STORE_BYTES = 80 << 20
"""Close to Ray's minimum: nothing large is passed through Ray."""

LOST = "the connection to the Ray cluster is lost"


class ClusterLostError(Exception):
    """The node that this process is connected to is gone, and with it every worker."""


class WorkerLostError(Exception):
    """An actor's process or node is gone, or it has not started yet.

    Attributes:
        permanent: whether Ray does not restart it.
    """

    def __init__(self, reason: str, *, permanent: bool) -> None:
        super().__init__(reason)
        self.permanent = permanent


class RayCluster:
    """A connection to a Ray cluster, and with the address ``local`` the cluster itself.

    Open and close it on the main thread: Linux ends Ray's processes with the thread that started
    them.

    Args:
        address: "local" starts a cluster on this machine's loopback, which ends with ``close``;
            "auto" is a running cluster on this machine; "ray://HOST:10001" is one elsewhere.
        cpus: number of cores that each actor needs.
        gpus: number of GPUs that each actor needs.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
        ClusterLostError: Ray cannot start a node here.
    """

    def __init__(self, address: str, cpus: float, gpus: float) -> None:
        check_installed(("ray",), "a cluster", "cluster")
        self.needs = {"CPU": cpus, "GPU": gpus}
        self._ray = _connect(address)
        self._worker = self._ray.remote(Worker)
        self._own_node: str = self._ray.get_runtime_context().get_node_id()
        self._options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 4,  # a worker can be stopped while a report waits
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; end the actors, and the cluster if it was started here."""
        self._ray.shutdown()

    def nodes(self) -> list[NodeReport]:
        """Return all nodes that are alive.

        Raises:
            ClusterLostError: the node of this process has died, or the cluster cannot be reached.
                Ray then ends the actors of this process and creates no others.
        """
        try:
            found = self._ray.nodes()
        except connection_errors(self._ray):
            raise ClusterLostError(LOST) from None
        nodes = [
            NodeReport(
                id=node["NodeID"],
                name=node["NodeName"] or node["NodeManagerAddress"],
                address=node["NodeManagerAddress"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in found
            if node["Alive"]
        ]
        if all(node.id != self._own_node for node in nodes):
            raise ClusterLostError("the Ray node that this command is connected to has died")
        return nodes

    def missing(self) -> str:
        """Describe what is not free for one more actor; "" if nothing is missing."""
        free = self._ray.available_resources()
        lacking = [
            f"{count:g} {name}" for name, count in self.needs.items() if free.get(name, 0) < count
        ]
        return f"needs {' and '.join(lacking)}; no node has as much free" if lacking else ""

    def address(self) -> str:
        """Return the address at which the nodes reach this machine."""
        return str(self._ray.util.get_node_ip_address())

    def place(self, node: str | None = None) -> Actor:
        """Create an actor. Ray chooses its node, and restarts it when its process dies.

        Args:
            node: the id of the node to prefer while it lives; None for any.

        Raises:
            ClusterLostError: there is no connection to the cluster any more.
        """
        options = self._options
        if node is not None:
            strategies = self._ray.util.scheduling_strategies
            strategy = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
            options = options | {"scheduling_strategy": strategy}
        try:
            return Actor(self._ray, self._worker.options(**options).remote())
        except connection_errors(self._ray):
            raise ClusterLostError(LOST) from None


class Actor:
    """One ``Worker`` in the cluster; call its methods with ``call``."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    async def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the worker and return its result.

        Raises:
            WorkerLostError: the process is gone, or is not there yet.
            Exception: what the method raised.
        """
        errors = self._ray.exceptions
        try:
            # Ray Client's thread fails if its future is cancelled, so only the wait is cancelled.
            answer = asyncio.ensure_future(getattr(self._handle, method).remote(*arguments))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await asyncio.shield(answer)
        except errors.ActorUnavailableError:
            raise WorkerLostError("its process or its node is gone", permanent=False) from None
        except errors.RayActorError as error:
            raise WorkerLostError(shorten(str(error)), permanent=True) from None
        except errors.RayTaskError as error:
            raise error.cause from None
        except connection_errors(self._ray):
            raise WorkerLostError(LOST, permanent=True) from None

    def kill(self, *, restart: bool = False) -> None:
        """End the process; with ``restart``, Ray starts a new one."""
        with suppress(*connection_errors(self._ray)):  # without a connection, Ray ends it
            self._ray.kill(self._handle, no_restart=not restart)


def connection_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors that Ray raises after the connection to the cluster is lost."""
    errors: tuple[type[Exception], ...] = (ConnectionError, ray.exceptions.RaySystemError)
    grpc = sys.modules.get("grpc")  # Ray Client has imported it
    return errors if grpc is None else (*errors, grpc.RpcError)


def _connect(address: str) -> Any:
    # Without a connection Ray would start a cluster of its own at the next call.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    for name, value in _LOCAL_ENVIRONMENT.items() if address == LOCAL else ():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    import ray.util.scheduling_strategies

    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        options |= {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_system_config": HEALTH_CHECKS,
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says the same
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"no Ray cluster at {address}: {shorten(str(error)).rstrip('.')}; start one with "
            "ray start --head, or use --address local"
        ) from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # What Ray raises if a node does not start within 30 s.
        raise ClusterLostError(f"Ray has not started: {shorten(str(error))}") from None
    return ray
