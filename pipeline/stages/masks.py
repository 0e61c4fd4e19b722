"""Masks stage: computes the masks and poses of detections, and tracks the objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskcast.engines.engine import Engine
from maskcast.engines.instances.instances import Instances
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.frame import POSE, Frame, begin_batch, end_batch
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.stages.infer import Detected
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.tracking.analysis import UNTRACKED, Analysis, SourceAnalysis


@dataclass(frozen=True, slots=True)
class Segmented:
    """A frame, its instances, and what tracking found."""

    frame: Frame
    instances: Instances
    analysis: Analysis = UNTRACKED


class MasksStage(Stage[Detected, Segmented]):
    """Computes the masks of detected boxes, and tracks the objects.

    If the engine has a pose model, poses are estimated before the masks.

    Args:
        inbox: batches of frames, and events.
        outbox: single frames, and events.
        engine: computes the masks and the poses.
        analyse: returns a new analysis of a source, or None for a source that is not tracked.
            Called at a source's first frame, and again if frames follow its end.
        context: as in ``Stage``.
    """

    def __init__(
        self,
        inbox: Inbox[Detected | Event],
        outbox: Inbox[Segmented | Event],
        engine: Engine,
        analyse: Callable[[str], SourceAnalysis | None],
        context: PipelineContext,
    ) -> None:
        super().__init__("masks", inbox, outbox, context)
        mark_abandonable(self)
        self._engine = engine
        self._analyse = analyse
        self._analyses: dict[str, SourceAnalysis | None] = {}

    def work(self, items: list[Detected]) -> list[Segmented]:
        """Estimate the poses and compute the masks of one batch, and update the tracks."""
        (detected,) = items
        frames, detections = detected.frames, detected.detections
        try:
            if self._engine.has_pose:
                begin_ns = begin_batch(frames, POSE)
                detections = self._engine.estimate_pose(detections)
                end_batch(frames, POSE, begin_ns)
            begin_ns = begin_batch(frames, "masks")
            instances = self._engine.segment(detections)
        finally:
            detections.release()
        segmented = [self._track(*pair) for pair in zip(frames, instances, strict=True)]
        end_batch(frames, "masks", begin_ns)
        return segmented

    def event(self, event: Event) -> None:
        """Pass an event on; before a source's ``ended``, send the final events of its tracks."""
        if event.name == "ended" and (analysis := self._analyses.pop(event.source, None)):
            for name, data in analysis.end("ended"):
                super().event(Event(event.source, name, data))
        super().event(event)

    def _track(self, frame: Frame, instances: Instances) -> Segmented:
        source = frame.source
        if source not in self._analyses:
            self._analyses[source] = self._analyse(source)
        analysis = self._analyses[source]
        if analysis is None:
            return Segmented(frame, instances)
        return Segmented(frame, *analysis.update(frame, instances))
