"""Controllable: what the control socket changes, a pipeline or a cluster."""

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
        """Return nodes and gateway; None for a pipeline alone."""


class RunningPipeline(Protocol):
    """What the control socket needs of a pipeline."""

    def add(self, source: SourceConfig) -> None:
        """Read one more source."""

    def remove(self, name: str) -> None:
        """Remove a source."""

    def sources(self) -> list[SourceConfig]:
        """Return the sources' configurations."""

    def stats(self) -> Stats:
        """Return the current figures."""


class PipelineControl:
    """One pipeline as ``Controllable``."""

    def __init__(self, pipeline: RunningPipeline) -> None:
        self._pipeline = pipeline
        self.add, self.remove = pipeline.add, pipeline.remove

    def move(self, name: str, node: str) -> None:
        """Refuse: there is no other node.

        Raises:
            InputError: always.
        """
        raise InputError(f"cannot move {name!r}: this is one pipeline, not maskcast cluster run")

    def reports(self) -> list[SourceReport]:
        """Return the sources with their states and figures."""
        stats = {source.name: source for source in self._pipeline.stats().sources}
        return [
            report_source(config, stats[config.name])
            for config in self._pipeline.sources()
            if config.name in stats
        ]

    def cluster(self) -> None:
        """Return None: it is alone."""
