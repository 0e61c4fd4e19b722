"""Supervisor: keeps the sources of a configuration running on a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from msgspec.structs import replace

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.fleet import (
    check_fleet,
    check_placeable,
    gateway_settings,
    worker_config,
)
from maskcast.pipeline.cluster.gateway import GatewayStats
from maskcast.pipeline.cluster.gateway_process import GatewayProcess
from maskcast.pipeline.cluster.placed_source import PlacedSource
from maskcast.pipeline.cluster.ray_cluster import RayCluster, WorkerLostError
from maskcast.pipeline.cluster.removal import publish_removed
from maskcast.pipeline.configuration.config import Config, SourceConfig, name_sources
from maskcast.pipeline.control.messages import (
    ClusterReport,
    GatewayReport,
    Placement,
    SourceReport,
)
from maskcast.pipeline.log import fields
from maskcast.pipeline.monitor.health import Health
from maskcast.pipeline.sources.state import SourceState

METRICS_WITHIN_S = 2.0
"""Workers that have not answered after this time are absent from a scrape."""

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Supervisor:
    """Keeps every source running on a node, and a gateway between them and the subscribers.

    Everything happens in one event loop on a thread of its own. The methods may be called from any
    other thread.

    Args:
        config: sources, model and publishing; its ``cluster`` is set.
        cluster: where the sources run; belongs to the caller.

    Raises:
        InputError: the configuration is not valid for a cluster (see ``check_fleet``).
    """

    def __init__(self, config: Config, cluster: RayCluster) -> None:
        check_fleet(config)
        self._config, self._cluster = config, cluster
        self._sources: dict[str, PlacedSource] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._node_names: dict[str, str] = {}
        self._gateway = GatewayProcess(gateway_settings(config, cluster.address()))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="supervisor", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._do(self._gateway.start())
            for source in name_sources(self._config.sources):
                self.add(source)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, then the gateway."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def endpoint(self) -> str:
        """The endpoint for subscribers."""
        return self._gateway.endpoint

    @property
    def gateway_stats(self) -> GatewayStats | None:
        """The gateway's figures; None while it is down."""
        report = self._gateway.report
        return None if report is None else report.stats

    def add(self, source: SourceConfig) -> None:
        """Run one more source.

        Raises:
            InputError: it has no name, or one that is taken, or its URL is invalid.
        """
        self._do(self._add(source))

    def remove(self, name: str) -> None:
        """Begin to remove a source; it is gone when it is absent from ``reports``.

        Raises:
            InputError: there is no such source.
        """
        self._do(self._remove(name))

    def move(self, name: str, node: str) -> None:
        """Begin to move a source; ``reports`` shows where it is, and why it was not moved.

        Args:
            name: the source's name.
            node: the node's name, or the start of its id.

        Raises:
            InputError: there is no such source or node, or the source cannot run there.
        """
        self._do(self._move(name, node))

    def reports(self) -> list[SourceReport]:
        """Return the sources with their states, figures and placements."""
        nodes = self.nodes()
        return [self._report(source, nodes) for source in list(self._sources.values())]

    def nodes(self) -> dict[str, str]:
        """Return the name of each node by its id, including lost nodes."""
        self._node_names |= {node.id: node.name for node in self._cluster.nodes()}
        return self._node_names

    def cluster(self) -> ClusterReport:
        """Return the nodes and the gateway."""
        report = self._gateway.report
        return ClusterReport(
            self._cluster.nodes(),
            GatewayReport(
                self._gateway.endpoint,
                report.pid if report else None,
                self._gateway.restarts,
                report.stats.publishers if report else 0,
                report.stats.subscribers if report else 0,
                report.stats.lost if report else 0,
            ),
        )

    def health(self) -> Health:
        """Check whether every required source runs on a node, and the gateway works."""
        problems = [] if self._gateway.report else [f"no gateway at {self._gateway.endpoint}"]
        states = {}
        for source in list(self._sources.values()):
            states[source.name] = str(source.placement)
            if source.placement is Placement.RUNNING and source.report is not None:
                found = source.report.source
                states[source.name] = str(found.state) if found else states[source.name]
            if not source.source.required:
                continue
            if source.placement is Placement.RUNNING:
                problems += source.report.problems if source.report else []
            elif source.placement is not Placement.ENDED:
                detail = f": {source.detail}" if source.detail else ""
                problems.append(f"{source.name} is {source.placement}{detail}")
        return Health(not problems, problems, states)

    def metrics(self) -> list[tuple[str, str, list[Any]]]:
        """Return name, node and metric families of each source that runs."""
        return self._do(self._metrics())

    # ---- In the loop

    async def _add(self, source: SourceConfig) -> None:
        if source.name is None:
            raise InputError("a source that is added needs a name")
        if source.name in self._sources:
            raise InputError(
                f"there is a source {source.name!r} already; remove it first, or choose another "
                "name"
            )
        check_placeable(source)
        config = worker_config(self._config, source, self._gateway.sources_endpoint)
        self._sources[source.name] = PlacedSource(self._cluster, source.name, config)

    async def _remove(self, name: str) -> None:
        source = self._find(name)
        if source.placement is Placement.REMOVING:
            raise InputError(f"the source {name!r} is being removed already")
        source.placement = Placement.REMOVING

        async def finish() -> None:
            try:
                if not await source.end("remove") and source.pid:
                    await asyncio.to_thread(publish_removed, source.config)
            except InputError as error:
                shown = fields(source=name, reason=str(error))
                _logger.warning("removal_not_published", extra=shown)
            finally:
                del self._sources[name]

        self._removals.add(task := asyncio.create_task(finish(), name=f"remove {name}"))
        task.add_done_callback(self._removals.discard)

    async def _move(self, name: str, node: str) -> None:
        nodes = await asyncio.to_thread(self._cluster.nodes)
        found = [one for one in nodes if one.name == node or one.id.startswith(node)]
        if len(found) != 1:
            known = ", ".join(f"{one.name} ({one.id[:8]})" for one in nodes)
            what = "several nodes are" if found else "there is no node"
            raise InputError(f"{what} {node!r}; there are: {known}")
        self._find(name).move(found[0].id)

    async def _metrics(self) -> list[tuple[str, str, list[Any]]]:
        running = [
            source for source in self._sources.values() if source.placement is Placement.RUNNING
        ]

        async def ask(source: PlacedSource) -> list[Any]:
            assert source.actor is not None
            try:
                families: list[Any] = await asyncio.wait_for(
                    source.actor.call("metrics"), METRICS_WITHIN_S
                )
            except (WorkerLostError, TimeoutError):
                return []
            return families

        answers = await asyncio.gather(*map(ask, running))
        names = await asyncio.to_thread(self.nodes)
        return [
            (source.name, names.get(source.node, ""), families)
            for source, families in zip(running, answers, strict=True)
        ]

    async def _end(self) -> None:
        await asyncio.gather(
            *self._removals, *(source.end("stop") for source in self._sources.values())
        )
        await self._gateway.close()

    def _find(self, name: str) -> PlacedSource:
        if name not in self._sources:
            known = ", ".join(self._sources) or "none"
            raise InputError(f"there is no source {name!r}; there are: {known}")
        return self._sources[name]

    def _report(self, source: PlacedSource, nodes: dict[str, str]) -> SourceReport:
        last = source.report.source if source.report is not None else None
        report = last or SourceReport.unread(source.source)
        is_running = source.placement in (Placement.RUNNING, Placement.ENDED)
        return replace(
            report,
            state=report.state if is_running else SourceState.CONNECTING,
            detail=source.detail or report.detail,
            fps=report.fps if source.placement is Placement.RUNNING else 0.0,
            node=nodes.get(source.node),
            pid=source.pid or None,
            placement=source.placement,
            restarts=source.restarts,
        )

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
