"""Controllable: a pipeline or a cluster, as the control socket uses it."""

from __future__ import annotations

from typing import Protocol

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.control.messages import ClusterReport, SourceReport, report_source
from maskcast.pipeline.stats import Stats


class Controllable(Protocol):
    """A pipeline, or a cluster of them, whose sources can be added, removed and moved."""

    def add(self, source: SourceConfig) -> None:
        """Read one more source."""

    def remove(self, name: str) -> None:
        """Remove a source."""

    def move(self, name: str, node: str) -> None:
        """Begin to move a source to another node."""

    def reports(self) -> list[SourceReport]:
        """Return the sources with their states and figures."""

    def cluster(self) -> ClusterReport | None:
        """Return the nodes and the gateway; None for a single pipeline."""


class RunningPipeline(Protocol):
    """The methods of a pipeline that the control socket needs."""

    def add(self, source: SourceConfig) -> None:
        """Read one more source."""

    def remove(self, name: str) -> None:
        """Remove a source."""

    def sources(self) -> list[SourceConfig]:
        """Return the sources' configurations."""

    def stats(self) -> Stats:
        """Return the current figures."""


class PipelineControl:
    """Adapts one pipeline to ``Controllable``."""

    def __init__(self, pipeline: RunningPipeline) -> None:
        self._pipeline = pipeline
        self.add, self.remove = pipeline.add, pipeline.remove

    def move(self, name: str, node: str) -> None:
        """Reject the request: a single pipeline has no other node.

        Raises:
            InputError: always.
        """
        raise InputError(f"cannot move {name!r}: a single pipeline; use maskcast cluster run")

    def reports(self) -> list[SourceReport]:
        """Return the sources with their states and figures."""
        stats = {source.name: source for source in self._pipeline.stats().sources}
        return [
            report_source(config, stats[config.name])
            for config in self._pipeline.sources()
            if config.name in stats
        ]

    def cluster(self) -> None:
        """Return None: this is a single pipeline."""
