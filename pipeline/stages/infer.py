"""The infer and masks stages: the two halves of the engine's work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.engine import Detections, Engine, Mode
from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.engines.load import load_engine
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.config import Config, ModelConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.sources.open import is_live
from maskcast.pipeline.stages.preprocess import Prepared
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.tracking.analysis import UNTRACKED, Analysis, SourceAnalysis


def load_engine_for(config: Config) -> Engine:
    """Load what a configuration wants to run.

    Raises:
        InputError: there is no such bundle or engine, or the one cannot run the other.
    """
    model = config.model
    return load_engine(model.bundle, model.engine, mode_for(config))


def mode_for(config: Config) -> Mode:
    """Return the mode asked for; else latency counts where a camera is, or may yet come."""
    if config.model.mode != "auto":
        return config.model.mode
    may_be_live = config.control is not None or any(map(is_live, config.sources))
    return "latency" if may_be_live else "throughput"


def min_score_for(engine: Engine, model: ModelConfig) -> float:
    """Return the score below which nothing is reported: the one asked for, else the bundle's."""
    chosen = model.score_threshold
    return engine.manifest.score_threshold if chosen is None else chosen


def labels_of(
    classes: Sequence[str] | None, label_names: Sequence[str]
) -> NDArray[np.int32] | None:
    """Return the labels of the named classes, int32 ``[K]``; None for all.

    Raises:
        InputError: the model has no such class.
    """
    if classes is None:
        return None
    for name in classes:
        if name not in label_names[1:]:
            near = difflib.get_close_matches(name, label_names[1:], n=1)
            advice = (
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(label_names[1:])}"
            )
            raise InputError(f"model.classes: the model has no class {name!r}; {advice}")
    return np.array([label_names.index(name) for name in classes], np.int32)


def select(detections: Detections, labels: NDArray[np.int32]) -> Detections:
    """Return the detections of these labels; the features stay those of the whole batch."""
    wanted = np.isin(detections.labels, labels)
    return replace(
        detections,
        boxes=detections.boxes[wanted],
        scores=detections.scores[wanted],
        labels=detections.labels[wanted],
        image_index=detections.image_index[wanted],
    )


@dataclass(frozen=True, slots=True)
class Detected:
    """The frames of one batch and the boxes in them."""

    frames: list[Frame]
    detections: Detections


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame, what was seen in it, and what became of the objects that are followed."""

    frame: Frame
    instances: Instances
    analysis: Analysis = UNTRACKED


class InferStage(Stage[Prepared, Detected]):
    """Finds boxes, in as many frames at once as wait, fit the engine, and are of one shape."""

    def __init__(
        self,
        inbox: Inbox[Prepared | Event],
        outbox: Inbox[Detected | Event],
        engine: Engine,
        model: ModelConfig,
        context: PipelineContext,
    ) -> None:
        super().__init__("infer", inbox, outbox, context)
        mark_abandonable(self)
        self.batch_size = engine.max_batch
        self._engine = engine
        self._min_score = min_score_for(engine, model)
        self._labels = labels_of(model.classes, engine.manifest.labels)

    def alike(self, first: Prepared, other: Prepared) -> bool:
        """Only images of one shape make a batch."""
        return first.image.pixels.shape == other.image.pixels.shape

    def work(self, items: list[Prepared]) -> list[Detected]:
        """Detect in one batch."""
        frames = [item.frame for item in items]
        begin_ns = _begin(frames, "infer")
        detections = self._engine.detect([item.image for item in items], self._min_score)
        if self._labels is not None:
            detections = select(detections, self._labels)
        _end(frames, "infer", begin_ns)
        return [Detected(frames, detections)]


class MasksStage(Stage[Detected, Seen]):
    """Computes the masks of the boxes that were kept, and follows the objects that they show.

    Args:
        inbox: batches of frames, and events.
        outbox: single frames, and events.
        engine: computes the masks.
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
        """Segment one batch, and continue the tracks."""
        (detected,) = items
        begin_ns = _begin(detected.frames, "masks")
        try:
            instances = self._engine.segment(detected.detections)
        finally:
            detected.detections.release()
        seen = [self._follow(*pair) for pair in zip(detected.frames, instances, strict=True)]
        _end(detected.frames, "masks", begin_ns)
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


def _begin(frames: list[Frame], stage: str) -> int:
    """Stamp a batch: one start for all of its frames, by which it can be told that it was one."""
    frames[0].timeline.begin(stage)
    return frames[0].timeline.start_ns[stage]


def _end(frames: list[Frame], stage: str, begin_ns: int) -> None:
    frames[0].timeline.end(stage)
    for frame in frames:
        frame.timeline.start_ns[stage] = begin_ns
        frame.timeline.end_ns[stage] = frames[0].timeline.end_ns[stage]
