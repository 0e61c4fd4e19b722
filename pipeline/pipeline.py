"""Pipeline: sources, the five stages, and what holds them together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engines.engine import Engine
from engines.load import load_engine
from pipeline.config import Config, name_sources
from pipeline.decode import DecodeStage
from pipeline.frame import Frame
from pipeline.health import Health, check_health
from pipeline.inbox import Inbox, RoundRobin
from pipeline.infer import Detected, InferStage, MaskStage, Seen
from pipeline.preprocess import Prepared, PreprocessStage
from pipeline.publish import OnFrame, PublishStage, Recorder
from pipeline.stage import Event, Stage
from pipeline.stats import Meter, Stats, Witness

if TYPE_CHECKING:
    from pipeline.metrics_server import MetricsServer

BLOCK_CAPACITY = 2
"""Frames that wait for each source that may not lose any: one in hand, one to come."""

STOP_GRACE_S = 1.0
"""A decoder that hangs in a read when the pipeline stops is left behind after so long."""


_STOP, _REVIEW = "stop", "review"


class Pipeline:
    """Runs a configuration: reads its sources, finds what is in them, publishes it.

    ``run`` blocks until every source has ended or ``stop`` was called. ``start``, ``wait`` and
    ``join`` do the same in pieces. A pipeline runs once.

    Args:
        config: what to run; the pipeline is a function of it and holds no global state.
        engine: runs the model; loaded from ``config.model`` where absent. One that is given is left
            open.
        recorders: get every frame after its message is out; closed at the end.
        on_frame: called with every frame, on the publish stage's thread.
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
        self._names = [source.name or "" for source in self._configs]
        self._meter = Meter(self._names, witness)
        self._stages: tuple[Stage[Any, Any], ...] = ()
        self._queues: dict[str, Inbox[Any] | RoundRobin[Any]] = {}
        self._metrics: MetricsServer | None = None
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
            model = self.config.model
            engine = self._given_engine or load_engine(model.bundle, model.engine)
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
        self._build(engine)
        self._supervisor = threading.Thread(
            target=self._supervise, args=(engine,), name="pipeline", daemon=True
        )
        threads: tuple[threading.Thread, ...] = (*self._stages, *self._decoders, self._supervisor)
        for thread in threads:
            thread.start()

    def stop(self) -> None:
        """Ask for the end: what is in the engine still goes out. Safe in a signal handler."""
        self._orders.put(_STOP)

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
        optional = {source.name or "" for source in self._configs if not source.required}
        return check_health(self.stats(), optional)

    def _serve_metrics(self, engine: Engine) -> MetricsServer | None:
        if self.config.metrics is None:
            return None
        # Here, because an HTTP server takes long to import and most pipelines have none.
        from pipeline.metrics import make_registry
        from pipeline.metrics_server import MetricsServer

        registry = make_registry(self.stats, engine)
        return MetricsServer(self.config.metrics.address, registry, self.health)

    def _build(self, engine: Engine) -> None:
        """Make the inboxes and the stages between them."""
        manifest, meter, report = engine.manifest, self._meter, self._orders.put
        threshold = self.config.model.score_threshold
        min_score = manifest.score_threshold if threshold is None else threshold
        changed = threading.Condition()
        captured: list[Inbox[Frame | Event]] = [
            Inbox(BLOCK_CAPACITY, on_drop=self._drop_frame, changed=changed) for _ in self._configs
        ]
        prepared: Inbox[Prepared | Event] = Inbox(engine.max_batch, on_drop=self._drop_prepared)
        detected: Inbox[Detected | Event] = Inbox(on_drop=self._drop_detected)
        seen: Inbox[Seen | Event] = Inbox(on_drop=self._drop_seen)
        sources = RoundRobin(captured, changed)
        self._queues = {
            "preprocess": sources,
            "infer": prepared,
            "masks": detected,
            "publish": seen,
        }
        self._prepared = prepared
        self._behind_inference = (detected, seen)
        self._reading = threading.Event()
        self._decoders = [
            DecodeStage(
                source,
                inbox,
                meter,
                self._reading,
                self._limit,
                report,
                review=lambda: report(_REVIEW),
            )
            for source, inbox in zip(self._configs, captured, strict=True)
        ]
        self._stages = (
            PreprocessStage(sources, prepared, manifest, engine.prefetch, meter, report),
            InferStage(prepared, detected, engine, min_score, report),
            MaskStage(detected, seen, engine, report),
            PublishStage(
                seen,
                self.config.publish,
                manifest.labels,
                self._names,
                self._recorders,
                self._on_frame,
                meter,
                self._reading,
                report,
            ),
        )

    def _supervise(self, engine: Engine) -> None:
        """Obey orders until all stages are over, then clear up."""
        working = len(self._stages)
        while working:
            order = self._orders.get()
            if order is None:
                working -= 1
                continue
            if order == _REVIEW:
                self._give_up_unreachable()
                continue
            if isinstance(order, BaseException):
                self._error = self._error or order
            self._shut_down("stopped" if order == _STOP else "failed")
        deadline_s = time.monotonic() + STOP_GRACE_S
        for decoder in self._decoders:
            decoder.join(max(0.0, deadline_s - time.monotonic()))
        if self._metrics is not None:
            self._metrics.close()
        if self._given_engine is None:
            engine.close()
        unreachable = [decoder.unreachable for decoder in self._decoders]
        if self._error is None and all(unreachable):
            self._error = unreachable[0]

    def _give_up_unreachable(self) -> None:
        """Let a run end when all that is left of it are sources that have never answered.

        A typing error in an address is told at once, and a run over files ends with the files; but
        a camera that comes late joins the others.
        """
        left = [decoder for decoder in self._decoders if not decoder.is_over]
        if all(decoder.unreachable for decoder in left):
            for decoder in left:
                decoder.give_up()

    def _shut_down(self, reason: str) -> None:
        """Stop reading. What the engine has begun goes out; what waits before it is dropped.

        After a failure what waits anywhere is dropped: the stage that would take it may be gone.
        """
        for decoder in self._decoders:
            decoder.stop()
            decoder.end(reason, discard=True)
        self._reading.set()
        self._prepared.discard()
        if reason == "failed":
            for inbox in (self._prepared, *self._behind_inference):
                inbox.close(discard=True)

    def _drop_frame(self, item: Frame | Event, reason: str) -> None:
        assert isinstance(item, Frame)
        self._meter.dropped(item, "preprocess", reason)

    def _drop_prepared(self, item: Prepared | Event, reason: str) -> None:
        assert isinstance(item, Prepared)
        self._meter.dropped(item.frame, "infer", reason)

    def _drop_detected(self, item: Detected | Event, reason: str) -> None:
        assert isinstance(item, Detected)
        item.detections.release()
        for frame in item.frames:
            self._meter.dropped(frame, "masks", reason)

    def _drop_seen(self, item: Seen | Event, reason: str) -> None:
        assert isinstance(item, Seen)
        self._meter.dropped(item.frame, "publish", reason)
