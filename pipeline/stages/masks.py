"""Masks stage: computes masks and poses of detections, and follows the objects that they show."""

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
class Seen:
    """A frame, what was seen in it, and what became of the objects that are followed."""

    frame: Frame
    instances: Instances
    analysis: Analysis = UNTRACKED


class MasksStage(Stage[Detected, Seen]):
    """Computes the masks of the boxes that were kept, and follows the objects that they show.

    Before the masks it estimates poses, if the engine has a poser.

    Args:
        inbox: batches of frames, and events.
        outbox: single frames, and events.
        engine: computes the masks and the poses.
        analyse: makes the analysis of a source; None for a source that is not tracked. It is asked
            at a source's first frame, and again where frames come after its end.
        context: as of ``Stage``.
    """

    def __init__(
        self,
        inbox: Inbox[Detected | Event],
        outbox: Inbox[Seen | Event],
        engine: Engine,
        analyse: Callable[[str], SourceAnalysis | None],
        context: PipelineContext,
    ) -> None:
        super().__init__("masks", inbox, outbox, context)
        mark_abandonable(self)
        self._engine = engine
        self._analyse = analyse
        self._analyses: dict[str, SourceAnalysis | None] = {}

    def work(self, items: list[Detected]) -> list[Seen]:
        """Estimate poses in one batch, segment it, and continue the tracks."""
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
        seen = [self._follow(*pair) for pair in zip(frames, instances, strict=True)]
        end_batch(frames, "masks", begin_ns)
        return seen

    def event(self, event: Event) -> None:
        """Pass an event on; before the end of a source, those of its tracks."""
        if event.name == "ended" and (analysis := self._analyses.pop(event.source, None)):
            for name, data in analysis.end("ended"):
                super().event(Event(event.source, name, data))
        super().event(event)

    def _follow(self, frame: Frame, instances: Instances) -> Seen:
        source = frame.source
        if source not in self._analyses:
            self._analyses[source] = self._analyse(source)
        analysis = self._analyses[source]
        if analysis is None:
            return Seen(frame, instances)
        return Seen(frame, *analysis.update(frame, instances))
