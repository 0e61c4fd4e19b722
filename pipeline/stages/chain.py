"""StageChain: the stages of a pipeline, from decode to record, and the inboxes between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from maskcast.engines.engine import Engine
from maskcast.pipeline.configuration.config import Config, ModelConfig, SourceConfig
from maskcast.pipeline.inbox import Inbox, RoundRobin
from maskcast.pipeline.outputs.recorder import Recorder
from maskcast.pipeline.sources.open import is_tracked
from maskcast.pipeline.stages.decoders import Decoders
from maskcast.pipeline.stages.infer import Detected, InferStage, min_score_for
from maskcast.pipeline.stages.masks import MasksStage, Segmented
from maskcast.pipeline.stages.preprocess import Prepared, PreprocessStage
from maskcast.pipeline.stages.publish import PublishStage, Tracer
from maskcast.pipeline.stages.record import OnFrame, Recorded, RecordStage
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.tracking.analysis import SourceAnalysis
from maskcast.pipeline.tracking.regions import check_labels

RECORD_CAPACITY = 8
"""Capacity of the record stage's inbox: a third of a second of one camera."""


class StageChain:
    """One decoder per source, then one thread per stage, connected by bounded inboxes.

    Args:
        config: the pipeline's configuration.
        configs: its sources, all named.
        engine: runs the model.
        recorders: receive every frame after it is published; closed at the end.
        on_frame: called with every published frame.
        context: what the stages share.
        tracer: makes spans of published frames.

    Attributes:
        decoders: the sources' decoders.
    """

    def __init__(
        self,
        config: Config,
        configs: Sequence[SourceConfig],
        engine: Engine,
        recorders: Sequence[Recorder],
        on_frame: OnFrame | None,
        context: PipelineContext,
        tracer: Tracer | None,
    ) -> None:
        manifest, changed = engine.manifest, threading.Condition()
        self._label_names = manifest.labels
        for source in configs:
            self._check(source)
        recording: Inbox[Recorded | Event] | None = None
        if recorders or on_frame is not None:
            recording = Inbox(RECORD_CAPACITY, "latest", self._drop_recorded, changed)
        self.decoders = Decoders(
            configs,
            context,
            open_end=config.control is not None,
            changed=changed,
            is_held=lambda: recording is not None and len(recording) >= RECORD_CAPACITY,
        )
        self._meter = context.meter
        self._prepared: Inbox[Prepared | Event] = Inbox(
            engine.max_batch, on_drop=self._drop_prepared
        )
        self._detected: Inbox[Detected | Event] = Inbox(on_drop=self._drop_detected)
        self._segmented: Inbox[Segmented | Event] = Inbox(on_drop=self._drop_segmented)
        decoded = self.decoders.outlet
        self._stages: list[Stage[Any, Any]] = [
            PreprocessStage(decoded, self._prepared, engine, context),
            InferStage(self._prepared, self._detected, engine, config.model, context),
            MasksStage(
                self._detected,
                self._segmented,
                engine,
                lambda source: self._analyse(source, engine, config.model),
                context,
            ),
            PublishStage(
                self._segmented, config.publish, manifest, self.decoders, recording, context, tracer
            ),
        ]
        self._inboxes: dict[str, Inbox[Any] | RoundRobin[Any]] = {
            "preprocess": decoded,
            "infer": self._prepared,
            "masks": self._detected,
            "publish": self._segmented,
        }
        self._after_engine = self._stages[3:]
        self._record: RecordStage | None = None
        if recording is not None:
            record = self._record = RecordStage(recording, recorders, on_frame, context)
            self._stages.append(record)
            self._after_engine.append(record)
            self._inboxes[record.name] = recording

    def add(self, source: SourceConfig) -> None:
        """Read one more source.

        Raises:
            InputError: see ``Decoders.add``; or a zone or line counts a class the model lacks.
        """
        self._check(source)
        self.decoders.add(source)

    def start(self) -> None:
        """Start all threads, beginning with the last stage, which closes the recorders."""
        try:
            self._stages[-1].start()
        except BaseException:
            self._stages[-1].close()
            raise
        for stage in reversed(self._stages[:-1]):
            stage.start()
        self.decoders.start()

    @property
    def started(self) -> int:
        """Number of stages that were started; each sends one ``StageEnded``."""
        return sum(stage.ident is not None for stage in self._stages)

    @property
    def is_published(self) -> bool:
        """Whether everything is sent and recorded, and sockets and files are closed."""
        return all(stage.ident is not None and not stage.is_alive() for stage in self._after_engine)

    def queue_depth(self) -> dict[str, int]:
        """Return the number of frames that wait for each stage, by the stage's name."""
        return {stage: inbox.waiting for stage, inbox in self._inboxes.items()}

    def at_work_s(self) -> dict[str, float]:
        """Return the seconds since each stage began its current work; idle stages are absent."""
        return {stage.name: s for stage in self._stages if (s := stage.at_work_s) is not None}

    def drain(self) -> None:
        """Drop the frames that the engine has not started on; the others are still published."""
        self._prepared.discard()

    def bypass_engine(self) -> None:
        """Let the publish stage end without waiting for the frames in the engine.

        An engine can take seconds for the first frame of a size, or for every frame of a large
        model on a CPU. The publish stage itself then publishes the remaining ``ended`` events.
        """
        self._prepared.close(discard=True)
        self._detected.close(discard=True)
        self._segmented.close()

    def abandon_hanging_output(self) -> bool:
        """Abandon an output whose write hangs (``RecordStage.abandon_hanging``)."""
        record = self._record
        return record is not None and record.is_alive() and record.abandon_hanging()

    def abort(self) -> None:
        """Drop all waiting frames: after a failure, the stage that would take them may be gone."""
        for inbox in (self._prepared, self._detected, self._segmented):
            inbox.close(discard=True)

    def _check(self, source: SourceConfig) -> None:
        check_labels((*source.zones, *source.lines), self._label_names, source.name or source.url)

    def _analyse(self, source: str, engine: Engine, model: ModelConfig) -> SourceAnalysis | None:
        """Return a new analysis of a source; None if the source is not tracked."""
        for config in self.decoders.configs():
            if config.name == source and is_tracked(config):
                min_score = min_score_for(engine, model)
                return SourceAnalysis(config, engine.manifest.labels, min_score)
        return None

    def _drop_prepared(self, item: Prepared | Event, reason: str) -> None:
        assert isinstance(item, Prepared)
        self._meter.dropped(item.frame, "infer", reason)

    def _drop_detected(self, item: Detected | Event, reason: str) -> None:
        assert isinstance(item, Detected)
        item.detections.release()
        for frame in item.frames:
            self._meter.dropped(frame, "masks", reason)

    def _drop_segmented(self, item: Segmented | Event, reason: str) -> None:
        assert isinstance(item, Segmented)
        self._meter.dropped(item.frame, "publish", reason)

    def _drop_recorded(self, item: Recorded | Event, reason: str) -> None:
        assert isinstance(item, Recorded)
        self._meter.unrecorded(item.frame, reason)
