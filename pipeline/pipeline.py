"""Pipeline: reads the sources of a configuration, runs the model on them, publishes the results.

``start`` opens what the run needs and starts the supervisor. The supervisor's thread starts
everything else, follows orders until all stages have ended, and closes everything.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from maskcast.engines.bundle import open_bundle
from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.engines.image import input_shape
from maskcast.pipeline.configuration.config import Config, SourceConfig, name_sources
from maskcast.pipeline.control.controllable import PipelineControl
from maskcast.pipeline.control.server import ControlServer, control_config, secret_key_of
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.monitor.health import Health, check_health
from maskcast.pipeline.orders import Failed, Order, Review, SourceRemoved, StageEnded, Stop
from maskcast.pipeline.outputs.audio import audio_file
from maskcast.pipeline.outputs.outputs import make_recorders
from maskcast.pipeline.outputs.recorder import Recorder
from maskcast.pipeline.sources.state import MOVED
from maskcast.pipeline.stages.chain import StageChain
from maskcast.pipeline.stages.infer import load_engine_for
from maskcast.pipeline.stages.record import OnFrame
from maskcast.pipeline.stages.stage import PipelineContext
from maskcast.pipeline.stats import Meter, Stats, Witness
from maskcast.pipeline.validation import check_config

if TYPE_CHECKING:
    from maskcast.pipeline.monitor.server import MetricsServer
    from maskcast.pipeline.monitor.tracing import FrameTracer

STOP_GRACE_S = 1.0
"""At the end, a decoder that hangs in a read is abandoned after this many seconds."""

WRITE_CHECK_S = 0.2
"""After an order to end, how often to check whether a write to an output hangs."""

DRAIN_S = 0.7
"""After an order to end, the engine has this many seconds to finish the frames it has begun."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a started pipeline consists of."""

    engine: Engine
    stages: StageChain
    metrics: MetricsServer | None
    tracer: FrameTracer | None
    control: ControlServer | None


class Pipeline:
    """Runs a configuration. A pipeline runs once.

    ``run`` blocks until every source has ended or ``stop`` is called. ``start``, ``wait`` and
    ``join`` do the same in steps.

    Args:
        config: what to run; there is no global state.
        engine: runs the model, and is left open; loaded from ``config.model`` if None. With a
            poser loaded, it estimates poses.
        recorders: receive every frame after its message is sent, besides the files of
            ``config.outputs``; closed at the end.
        on_frame: called with every frame after its message is sent, on the record stage's thread.
            A slow callback delays no message: a live source's frames then skip it, counted in
            ``SourceStats.unrecorded``; files wait for it. An error that it raises ends the run.
        limit: maximum number of frames to read from each source; None for all.
        witness: receives every frame when it is published or dropped.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine | None = None,
        *,
        recorders: Sequence[Recorder] = (),
        on_frame: OnFrame | None = None,
        limit: int | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.config = config
        self._given_engine = engine
        self._recorders = recorders
        self._on_frame = on_frame
        self._limit = limit
        self._configs = name_sources(config.sources)
        self._meter = Meter([source.name or "" for source in self._configs], witness)
        self._reading = threading.Event()
        # SimpleQueue.put may be called in a signal handler, whatever the thread was doing.
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._has_started = False
        self._parts: _Parts | None = None
        self._supervisor: threading.Thread | None = None
        self._ending = ""
        self._error: BaseException | None = None

    # ---- What callers do, from any thread

    def run(self) -> None:
        """Run to the end.

        Raises:
            InputError: the configuration cannot be run: no such file, address in use, …
            Exception: an error of a stage, with its traceback.
        """
        self.start()
        try:
            self.join()
        except KeyboardInterrupt:
            self.stop()
            self.join()
            raise

    def start(self) -> None:
        """Load the model and start to run, in the background.

        Raises:
            InputError: see ``check_config``, the model cannot be loaded, or the address for
                metrics is in use.
            RuntimeError: the pipeline was started before.
        """
        if self._has_started:
            raise RuntimeError("the pipeline was started before; create a new one for each run")
        self._has_started = True
        with ExitStack() as undo:
            for recorder in self._recorders:
                undo.callback(recorder.close)
            parts = self._open(self._checked_engine(undo), undo)
            supervisor = threading.Thread(
                target=self._supervise, args=(parts,), name="pipeline", daemon=True
            )
            self._parts, self._supervisor = parts, supervisor
            supervisor.start()
            undo.pop_all()  # the supervisor and the stages close what they own

    def stop(self) -> None:
        """End the run; frames in the engine are still published. Safe in a signal handler.

        A pipeline that is stopped before it starts ends as soon as it has started.
        """
        self._orders.put(Stop())

    def hand_over(self) -> None:
        """End as ``stop`` does, without ``ended``: another pipeline takes over the sources."""
        self._orders.put(Stop(MOVED))

    def add(self, source: SourceConfig) -> None:
        """Read one more source while the pipeline runs. If it fails, it alone ends.

        Raises:
            InputError: it has no name or one that is taken, its address is invalid, its zones name
                a class that the model does not have, or the pipeline is not running.
        """
        self._started().stages.add(source)

    def remove(self, name: str) -> None:
        """Remove a source while the pipeline runs; the others are not affected.

        Its name is free again once it is absent from ``sources``.

        Raises:
            InputError: there is no such source, or the pipeline is not running.
        """
        self._started().stages.decoders.remove(name)

    def sources(self) -> list[SourceConfig]:
        """Return the current sources, with their names and, once known, their policies."""
        return list(self._configs) if self._parts is None else self._parts.stages.decoders.configs()

    @property
    def is_published(self) -> bool:
        """Whether everything is published, and sockets and files are closed.

        After ``stop``, the engine may still be working on frames that will not be published.
        """
        return self._parts is not None and self._parts.stages.is_published

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended, for at most ``timeout_s``; return whether it has.

        Raises:
            RuntimeError: the pipeline has not started.
        """
        if self._supervisor is None:
            raise RuntimeError("the pipeline has not started; call start() first")
        self._supervisor.join(timeout_s)
        return not self._supervisor.is_alive()

    def join(self) -> None:
        """Wait until the run has ended.

        Raises:
            RuntimeError: the pipeline has not started.
            InputError, Exception: as in ``run``.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def stats(self) -> Stats:
        """Return the current figures."""
        if self._parts is None:
            return self._meter.stats()
        stages = self._parts.stages
        return self._meter.stats(stages.queue_depth(), stages.at_work_s())

    def health(self) -> Health:
        """Check whether every required source is streaming and the engine responds."""
        optional = {source.name or "" for source in self.sources() if not source.required}
        return check_health(self.stats(), optional)

    # ---- The run: open, start, follow orders, close

    def _checked_engine(self, undo: ExitStack) -> Engine:
        """Check the configuration, and load the engine unless there is one."""
        engine = self._given_engine
        if engine is None:
            bundle = open_bundle(self.config.model.bundle)
            check_config(self.config, bundle.manifest)
            engine = load_engine_for(self.config, bundle)
            undo.callback(engine.close)
            return engine
        check_config(self.config, engine.manifest)
        if self.config.model.pose and not engine.has_pose:
            raise InputError(
                "model.pose: the given engine has no poser; use load_engine(..., pose=True)"
            )
        return engine

    def _open(self, engine: Engine, undo: ExitStack) -> _Parts:
        """Open the outputs, bind the metrics' address, and create all parts of the run."""
        names = [config.name or "" for config in self._configs]
        recorders = make_recorders(self.config.outputs, engine.manifest, names, self._audio_of)
        for recorder in recorders:
            undo.callback(recorder.close)
        metrics = self._serve_metrics(engine)
        if metrics is not None:
            undo.callback(metrics.close)
        tracer = self._make_tracer()
        if tracer is not None:
            undo.callback(tracer.close)

        def is_ready(frame: Frame) -> bool:
            return engine.prepare(*input_shape(frame.decoded, frame.rotation, shape_limits))

        shape_limits = engine.manifest.input
        context = PipelineContext(
            self._meter,
            self._orders.put,
            self._reading,
            is_ready,
            self._limit,
            saves_video=self.config.outputs.save is not None,
            decode_device=engine.decode_device,
        )
        stages = StageChain(
            self.config,
            self._configs,
            engine,
            [*self._recorders, *recorders],
            self._on_frame,
            context,
            tracer,
        )
        return _Parts(engine, stages, metrics, tracer, self._make_control())

    def _supervise(self, parts: _Parts) -> None:
        """Start all threads, follow orders until the stages have ended, and close everything."""
        self._attempt(parts.stages.start)
        if parts.control is not None:
            self._attempt(parts.control.start)
        self._follow_orders(parts)
        self._attempt(parts.stages.decoders.join, STOP_GRACE_S)
        if parts.metrics is not None:
            self._attempt(parts.metrics.close)
        if parts.tracer is not None:
            self._attempt(parts.tracer.close)
        if self._given_engine is None:
            self._attempt(parts.engine.close)
        self._error = self._error or parts.stages.decoders.startup_error()

    def _follow_orders(self, parts: _Parts) -> None:
        """Follow orders until every stage that was started has ended."""
        running = parts.stages.started
        drained_by_s = math.inf
        while running:
            left_s = max(0.0, drained_by_s - time.monotonic())
            wait_s = min(left_s, WRITE_CHECK_S) if self._ending else None
            try:
                order = self._orders.get(timeout=wait_s)
            except queue.Empty:
                if time.monotonic() >= drained_by_s:
                    drained_by_s = math.inf
                    parts.stages.bypass_engine()
                if running == 1 and parts.stages.abandon_hanging_output():
                    return
                continue
            match order:
                case StageEnded():
                    running -= 1
                case SourceRemoved(name):
                    self._attempt(parts.stages.decoders.on_removed, name)
                case Review():
                    self._attempt(parts.stages.decoders.review)
                case Stop(reason):
                    self._end(parts, reason)
                    drained_by_s = min(drained_by_s, time.monotonic() + DRAIN_S)
                case Failed(error):
                    self._error = self._error or error
                    self._end(parts, "failed")
                    drained_by_s = min(drained_by_s, time.monotonic() + DRAIN_S)
                case _:
                    assert_never(order)

    def _end(self, parts: _Parts, reason: str) -> None:
        """Read nothing more, and let the stages end. A failure may follow a stop, once."""
        if self._ending in ("failed", reason):
            return
        self._ending = reason
        if parts.control is not None:
            self._attempt(parts.control.close)
        self._attempt(parts.stages.decoders.stop, reason)
        self._reading.set()
        self._attempt(parts.stages.abort if reason == "failed" else parts.stages.drain)

    def _attempt(self, step: Callable[..., object], *arguments: Any) -> None:
        """Do one step of the supervisor's work; an error in it is a failure of the run."""
        try:
            step(*arguments)
        except BaseException as error:
            self._error = self._error or error
            self._orders.put(Failed(error))

    # ---- Parts

    def _started(self) -> _Parts:
        if self._parts is None:
            raise InputError("the pipeline has not started")
        return self._parts

    def _audio_of(self, source: str) -> Path | None:
        configs = (config for config in self.sources() if config.name == source)
        return next(map(audio_file, configs), None)

    def _make_control(self) -> ControlServer | None:
        if self.config.control is None:
            return None
        return ControlServer(
            control_config(self.config.control),
            secret_key_of(self.config),
            PipelineControl(self),
            lambda error: self._orders.put(Failed(error)),
        )

    def _make_tracer(self) -> FrameTracer | None:
        if self.config.tracing is None:
            return None
        from maskcast.pipeline.monitor.tracing import FrameTracer

        return FrameTracer(self.config.tracing)

    def _serve_metrics(self, engine: Engine) -> MetricsServer | None:
        if self.config.metrics is None:
            return None
        # Imported here: an HTTP server is slow to import, and most pipelines have none.
        from maskcast.pipeline.monitor.metrics import make_registry
        from maskcast.pipeline.monitor.server import MetricsServer

        registry = make_registry(self.stats, engine)
        return MetricsServer(self.config.metrics.address, registry, self.health)
