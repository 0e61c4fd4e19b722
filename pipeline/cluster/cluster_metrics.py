"""Metrics of a cluster: those of all workers, with the labels ``node`` and ``source``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maskcast.pipeline.cluster.gateway import GatewayStats
from maskcast.pipeline.cluster.metrics import GatewayCollector
from maskcast.pipeline.control.messages import ClusterReport, Placement, SourceReport


class Measurable(Protocol):
    """A cluster whose figures can be read: the supervisor."""

    def reports(self) -> list[SourceReport]:
        """Return the sources with their placements."""

    def cluster(self) -> ClusterReport:
        """Return the nodes and the gateway."""

    def metrics(self) -> list[tuple[str, str, list[Metric]]]:
        """Return name, node and metric families of each source that runs."""

    @property
    def gateway_stats(self) -> GatewayStats | None:
        """The gateway's figures; None while it is down."""


def make_cluster_registry(supervisor: Measurable) -> CollectorRegistry:
    """Return a registry for a cluster; workers are asked at every scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ClusterCollector(supervisor))
    return registry


class ClusterCollector(Collector):
    """Merges the workers' families, and adds those of the cluster itself."""

    def __init__(self, supervisor: Measurable) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        """Yield every family once."""
        merged: dict[str, Metric] = {}
        for name, node, families in self._supervisor.metrics():
            for family in families:
                known = merged.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    placed = {"node": node, "source": name, **sample.labels}
                    known.samples.append(sample._replace(labels=placed))
        yield from merged.values()
        placements = GaugeMetricFamily(
            "maskcast_cluster_placement",
            "1 for the current placement of a source, 0 for the others.",
            labels=["source", "node", "placement"],
        )
        restarts = CounterMetricFamily(
            "maskcast_cluster_restarts", "Restarts of a source's worker.", labels=["source"]
        )
        for source in self._supervisor.reports():
            for possible in Placement:
                labels = [source.name, source.node or "", possible]
                placements.add_metric(labels, source.placement is possible)
            restarts.add_metric([source.name], source.restarts or 0)
        yield from (placements, restarts)
        cluster = self._supervisor.cluster()
        yield GaugeMetricFamily(
            "maskcast_cluster_nodes", "Nodes that are alive.", value=len(cluster.nodes)
        )
        yield CounterMetricFamily(
            "maskcast_gateway_restarts",
            "Restarts of the gateway's process.",
            value=cluster.gateway.restarts,
        )
        if (stats := self._supervisor.gateway_stats) is not None:
            yield from GatewayCollector(lambda: stats).collect()
