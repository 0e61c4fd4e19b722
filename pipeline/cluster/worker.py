"""Worker: the actor that runs the pipeline of one source, in a process of its own."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.engines.memory import limit_heaps
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.control.messages import SourceReport, report_source
from maskcast.pipeline.log import configure
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stages.infer import load_engine_for
from maskcast.pipeline.url import redact, shorten

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

END_WITHIN_S = 10.0
"""Maximum wait for a stopped pipeline, seconds; its process ends after that in any case. A pipeline
abandons what hangs after about a second, but a machine with too much work takes longer."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The state of a worker's pipeline.

    Attributes:
        source: the source's state and figures; None once it is removed.
        problems: the problems of its health check, one line each.
        ended: why the source has ended; None while it runs.
        error: why the pipeline has failed, one line; None if it has not.
    """

    source: SourceReport | None
    problems: list[str] = field(default_factory=list)
    ended: str | None = None
    error: str | None = None


class Worker:
    """Runs one pipeline with one source. Its methods are called by the supervisor, through Ray.

    ``load`` and ``start`` are separate, so that a source that moves is interrupted only once the
    new worker has its model.
    """

    def __init__(self) -> None:
        configure("info")
        limit_heaps()
        self._config: Config | None = None
        self._engine: Engine | None = None
        self._pipeline: Pipeline | None = None

    def place(self) -> tuple[str, int]:
        """Return the id of the node where Ray has placed the actor, and the process id."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def load(self, config: Config) -> None:
        """Load the model.

        Args:
            config: what to run, with one source.

        Raises:
            InputError: the model cannot be loaded.
        """
        self._config, self._engine = config, load_engine_for(config)

    def start(self) -> None:
        """Start reading the source and publishing.

        Raises:
            InputError: the configuration cannot be run here.
        """
        assert self._config is not None
        assert self._engine is not None
        self._pipeline = Pipeline(self._config, self._engine)
        self._pipeline.start()

    def report(self, wait_s: float) -> WorkerReport:
        """Return the current state, after ``wait_s`` or as soon as the pipeline has ended."""
        assert self._pipeline is not None
        error = None
        if self._pipeline.wait(wait_s):
            try:
                self._pipeline.join()
            except InputError as fault:
                error = str(fault)
            except Exception as fault:
                _logger.exception("pipeline_failed")
                error = f"{type(fault).__name__}: {fault}"
        error = shorten(redact(error)) if error else None
        stats = {source.name: source for source in self._pipeline.stats().sources}
        for config in self._pipeline.sources():
            if (source := stats.get(config.name or "")) is not None:
                return WorkerReport(
                    report_source(config, source),
                    self._pipeline.health().problems,
                    source.ended,
                    error,
                )
        return WorkerReport(None, ended="removed", error=error)

    def stop(self) -> bool:
        """Publish the frames that the engine has begun and ``ended``, for ``END_WITHIN_S``.

        Returns:
            Whether the pipeline has ended in that time.
        """
        if self._pipeline is None:
            return False
        self._pipeline.stop()
        return self._pipeline.wait(END_WITHIN_S)

    def remove(self) -> bool:
        """As ``stop``, with the reason ``removed``, so that gateways forget the source."""
        if self._pipeline is None:
            return False
        for source in self._pipeline.sources():
            self._pipeline.remove(source.name or "")
        return self._pipeline.wait(END_WITHIN_S)

    def hand_over(self) -> bool:
        """As ``stop``, without ``ended``: another worker takes over the source."""
        if self._pipeline is None:
            return False
        self._pipeline.hand_over()
        return self._pipeline.wait(END_WITHIN_S)

    def metrics(self) -> list[Metric]:
        """Return the pipeline's metric families."""
        from maskcast.pipeline.monitor.metrics import make_registry

        if self._pipeline is None or self._engine is None:
            return []
        return list(make_registry(self._pipeline.stats, self._engine).collect())
