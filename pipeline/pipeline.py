"""Pipeline: sources, the five stages, and what holds them together."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.engines.image import input_shape
from maskcast.pipeline.config import Config, SourceConfig, name_sources
from maskcast.pipeline.control import ControlServer
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox, RoundRobin
from maskcast.pipeline.monitor.health import Health, check_health
from maskcast.pipeline.outputs.recorder import Recorder
from maskcast.pipeline.stages.decoders import Decoders
from maskcast.pipeline.stages.infer import Detected, InferStage, MasksStage, Seen, load_engine_for
from maskcast.pipeline.stages.preprocess import Prepared, PreprocessStage
from maskcast.pipeline.stages.publish import PublishStage
from maskcast.pipeline.stages.record import OnFrame, Recorded, RecordStage
from maskcast.pipeline.stages.stage import Event, Stage
from maskcast.pipeline.stats import RECORD, Meter, Stats, Witness

if TYPE_CHECKING:
    from maskcast.pipeline.monitor.server import MetricsServer

STOP_GRACE_S = 1.0
"""A decoder that hangs in a read when the pipeline stops is left behind after so long."""

DRAIN_S = 0.7
"""What the engine has begun when the pipeline stops may take so long to be published."""

RECORD_CAPACITY = 8
"""Frames that wait for the record stage at most: a third of a second of one camera."""

_STOP, _REVIEW, _HURRY = "stop", "review", "hurry"


class Pipeline:
    """Runs a configuration: reads its sources, finds what is in them, publishes it.

    ``run`` blocks until every source has ended or ``stop`` was called. ``start``, ``wait`` and
    ``join`` do the same in pieces. A pipeline runs once.

    Args:
        config: what to run; the pipeline is a function of it and holds no global state.
        engine: runs the model; loaded from ``config.model`` where absent. One that is given is left
            open.
        recorders: get every frame after its message is out, besides the files of
            ``config.outputs``; closed at the end.
        on_frame: called with every frame after its message is out, on the record stage's thread.
            A slow callback delays no message: a live source's frames then skip it, counted in
            ``SourceStats.unrecorded``; files wait for it. An error that it raises ends the run.
        limit: the most frames to read from each source.
        witness: is shown every frame as it leaves, the dropped ones too.
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
        self._sources: Decoders | None = None
        self._stages: tuple[Stage[Any, Any], ...] = ()
        self._queues: dict[str, Inbox[Any] | RoundRobin[Any]] = {}
        self._metrics: MetricsServer | None = None
        self._control: ControlServer | None = None
        # SimpleQueue.put may be called in a signal handler, whatever the thread was doing.
        self._orders: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._supervisor: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run to the end.

        Raises:
            InputError: something in the configuration is wrong: no such file, address in use, …
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
        """Load the model and start all threads.

        Raises:
            InputError: the model cannot be loaded, or the address for metrics is in use.
        """
        if self._supervisor is not None:
            raise RuntimeError("a pipeline runs once; make another")
        try:
            engine = self._given_engine or load_engine_for(self.config)
            try:
                self._metrics = self._serve_metrics(engine)
            except BaseException:
                if self._given_engine is None:
                    engine.close()
                raise
        except BaseException:
            for recorder in self._recorders:
                recorder.close()
            raise
        sources = self._build(engine)
        if self.config.control is not None:
            curve = self.config.publish.curve if self.config.publish is not None else None
            self._control = ControlServer(self.config.control, curve, self, self._orders.put)
        self._supervisor = threading.Thread(
            target=self._supervise, args=(engine, sources), name="pipeline", daemon=True
        )
        for thread in (*self._stages, self._supervisor):
            thread.start()
        sources.start()
        if self._control is not None:
            self._control.start()

    def stop(self) -> None:
        """Ask for the end: what is in the engine still goes out. Safe in a signal handler."""
        self._orders.put(_STOP)

    def add(self, source: SourceConfig) -> None:
        """Read one more source while the pipeline runs; from any thread.

        That it cannot be read, or has ended, ends it alone.

        Raises:
            InputError: it has no name or one that is taken, its address is certainly wrong, or the
                pipeline does not run.
        """
        self._running().add(source)

    def remove(self, name: str) -> None:
        """Take a source away while the pipeline runs; from any thread. Others notice nothing.

        Its name is free again when it has gone from ``sources``.

        Raises:
            InputError: there is no such source, or the pipeline does not run.
        """
        self._running().remove(name)

    def sources(self) -> list[SourceConfig]:
        """Return what the sources of this moment are made from, named; policies once known."""
        return list(self._configs) if self._sources is None else self._sources.configs()

    @property
    def is_published(self) -> bool:
        """Whether everything is out that will be, and sockets and files are closed.

        After ``stop`` the engine may still be at work for long on what nobody waits for any more.
        """
        return self._supervisor is not None and not self._stages[-1].is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, so long at most; tell whether it has come."""
        if self._supervisor is None:
            return False
        self._supervisor.join(timeout_s)
        return not self._supervisor.is_alive()

    def join(self) -> None:
        """Wait for the end.

        Raises:
            InputError, Exception: as ``run``.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        return self._meter.stats(
            {stage: outlet.waiting for stage, outlet in self._queues.items()},
            {stage.name: s for stage in self._stages if (s := stage.at_work_s) is not None},
        )

    def health(self) -> Health:
        """Judge this moment: whether every required source streams and the engine answers."""
        optional = {source.name or "" for source in self.sources() if not source.required}
        return check_health(self.stats(), optional)

    def _serve_metrics(self, engine: Engine) -> MetricsServer | None:
        if self.config.metrics is None:
            return None
        # Here, because an HTTP server takes long to import and most pipelines have none.
        from maskcast.pipeline.monitor.metrics import make_registry
        from maskcast.pipeline.monitor.server import MetricsServer

        registry = make_registry(self.stats, engine)
        return MetricsServer(self.config.metrics.address, registry, self.health)

    def _running(self) -> Decoders:
        if self._sources is None:
            raise InputError("the pipeline has not started")
        return self._sources

    def _build(self, engine: Engine) -> Decoders:
        """Make the inboxes and the stages between them."""
        manifest, meter, report = engine.manifest, self._meter, self._orders.put
        threshold = self.config.model.score_threshold
        min_score = manifest.score_threshold if threshold is None else threshold

        def is_ready(frame: Frame) -> bool:
            return engine.prepare(*input_shape(frame.picture, frame.rotation, manifest.input))

        self._reading = threading.Event()
        changed = threading.Condition()
        recording: Inbox[Recorded | Event] | None = None
        if self._recorders or self._on_frame is not None:
            recording = Inbox(RECORD_CAPACITY, "latest", self._drop_recorded, changed)
        self._sources = sources = Decoders(
            self._configs,
            meter,
            self._reading,
            self._limit,
            report,
            lambda: report(_REVIEW),
            is_ready,
            stays=self.config.control is not None,
            changed=changed,
            is_held=lambda: recording is not None and len(recording) >= RECORD_CAPACITY,
        )
        prepared: Inbox[Prepared | Event] = Inbox(engine.max_batch, on_drop=self._drop_prepared)
        detected: Inbox[Detected | Event] = Inbox(on_drop=self._drop_detected)
        seen: Inbox[Seen | Event] = Inbox(on_drop=self._drop_seen)
        self._queues = {
            "preprocess": sources.outlet,
            "infer": prepared,
            "masks": detected,
            "publish": seen,
        }
        self._prepared = prepared
        self._behind_inference = (detected, seen)
        self._stages = (
            PreprocessStage(sources.outlet, prepared, manifest, engine.prefetch, meter, report),
            InferStage(prepared, detected, engine, min_score, report),
            MasksStage(detected, seen, engine, report),
            PublishStage(
                seen,
                self.config.publish,
                manifest.labels,
                sources,
                recording,
                meter,
                self._reading,
                report,
            ),
        )
        if recording is not None:
            self._queues[RECORD] = recording
            self._stages += (
                RecordStage(recording, self._recorders, self._on_frame, meter, report),
            )
        return sources

    def _supervise(self, engine: Engine, sources: Decoders) -> None:
        """Obey orders until all stages are over, then clear up."""
        working = len(self._stages)
        drained_by_s = math.inf
        while working:
            order = self._next_order(drained_by_s)
            if order == _HURRY:
                drained_by_s = math.inf
                self._pass_by_engine()
                continue
            if order is None:
                working -= 1
                continue
            if order == _REVIEW:
                sources.review()
                continue
            if isinstance(order, BaseException):
                self._error = self._error or order
            self._shut_down(sources, "stopped" if order == _STOP else "failed")
            drained_by_s = min(drained_by_s, time.monotonic() + DRAIN_S)
        sources.join(STOP_GRACE_S)
        if self._metrics is not None:
            self._metrics.close()
        if self._given_engine is None:
            engine.close()
        self._error = self._error or sources.startup_error()

    def _next_order(self, by_s: float) -> str | BaseException | None:
        left_s = max(0.0, by_s - time.monotonic())
        try:
            return self._orders.get(timeout=None if left_s == math.inf else left_s)
        except queue.Empty:
            return _HURRY

    def _pass_by_engine(self) -> None:
        """Let the publish stage end, though the engine is still at work on what it began.

        The first picture of a size can take an engine seconds, and on a CPU a large model any. The
        publish stage itself says that the sources have ended, where their word is stuck behind.
        """
        detected, seen = self._behind_inference
        for inbox in (self._prepared, detected):
            inbox.close(discard=True)
        seen.close()

    def _shut_down(self, sources: Decoders, reason: str) -> None:
        """Stop reading. What the engine has begun goes out; what waits before it is dropped.

        After a failure what waits anywhere is dropped: the stage that would take it may be gone.
        """
        if self._control is not None:
            self._control.close()
        sources.stop(reason)
        self._reading.set()
        self._prepared.discard()
        if reason == "failed":
            for inbox in (self._prepared, *self._behind_inference):
                inbox.close(discard=True)

    def _drop_prepared(self, item: Prepared | Event, reason: str) -> None:
        assert isinstance(item, Prepared)
        self._meter.dropped(item.frame, "infer", reason)

    def _drop_detected(self, item: Detected | Event, reason: str) -> None:
        assert isinstance(item, Detected)
        item.detections.release()
        for frame in item.frames:
            self._meter.dropped(frame, "masks", reason)

    def _drop_recorded(self, item: Recorded | Event, reason: str) -> None:
        assert isinstance(item, Recorded)
        self._meter.unrecorded(item.frame, reason)

    def _drop_seen(self, item: Seen | Event, reason: str) -> None:
        assert isinstance(item, Seen)
        self._meter.dropped(item.frame, "publish", reason)
