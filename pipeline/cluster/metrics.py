"""Metrics of a gateway, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maskcast.pipeline.cluster.gateway import GatewayStats

_COUNTERS = {
    "messages": "Messages passed on, frames and events.",
    "bytes": "Bytes of the messages passed on.",
    "lost": "Subscribed frames that did not arrive, by the sequence numbers.",
    "duplicate": "Frames that arrived twice and were passed on once.",
    "malformed": "Messages that could not be read or were too long.",
}
_GAUGES = {"publishers": "Connected publishers.", "subscribers": "Connected subscribers."}


def make_gateway_registry(read: Callable[[], GatewayStats]) -> CollectorRegistry:
    """Return a registry for one gateway; its figures are read at every scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(GatewayCollector(read))
    ProcessCollector(registry=registry)
    return registry


class GatewayCollector(Collector):
    """Converts a gateway's figures to metric families."""

    def __init__(self, read: Callable[[], GatewayStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield every family once."""
        stats = self._read()
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(
                f"maskcast_gateway_{name}", help_text, value=getattr(stats, name)
            )
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(
                f"maskcast_gateway_{name}", help_text, value=getattr(stats, name)
            )
        yield GaugeMetricFamily(
            "maskcast_gateway_sources", "Sources that are known.", value=len(stats.sources)
        )
