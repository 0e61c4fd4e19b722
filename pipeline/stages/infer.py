"""The infer and masks stages: the two halves of the engine's work."""

from __future__ import annotations

from dataclasses import dataclass

from maskcast.engines.engine import Detections, Engine, Mode
from maskcast.engines.instances import Instances
from maskcast.engines.load import load_engine
from maskcast.pipeline.config import Config
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.sources.open import is_live
from maskcast.pipeline.stages.preprocess import Prepared
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage


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


@dataclass(frozen=True, slots=True)
class Detected:
    """The frames of one batch and the boxes in them."""

    frames: list[Frame]
    detections: Detections


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame and what was seen in it."""

    frame: Frame
    instances: Instances


class InferStage(Stage[Prepared, Detected]):
    """Finds boxes, in as many frames at once as wait, fit the engine, and are of one shape."""

    def __init__(
        self,
        inbox: Inbox[Prepared | Event],
        outbox: Inbox[Detected | Event],
        engine: Engine,
        min_score: float,
        context: PipelineContext,
    ) -> None:
        super().__init__("infer", inbox, outbox, context)
        self.batch_size = engine.max_batch
        self._engine = engine
        self._min_score = min_score

    def alike(self, first: Prepared, other: Prepared) -> bool:
        """Only images of one shape make a batch."""
        return first.image.pixels.shape == other.image.pixels.shape

    def work(self, items: list[Prepared]) -> list[Detected]:
        """Detect in one batch."""
        frames = [item.frame for item in items]
        begin_ns = _begin(frames, "infer")
        detections = self._engine.detect([item.image for item in items], self._min_score)
        _end(frames, "infer", begin_ns)
        return [Detected(frames, detections)]


class MasksStage(Stage[Detected, Seen]):
    """Computes the masks of the boxes that were kept."""

    def __init__(
        self,
        inbox: Inbox[Detected | Event],
        outbox: Inbox[Seen | Event],
        engine: Engine,
        context: PipelineContext,
    ) -> None:
        super().__init__("masks", inbox, outbox, context)
        self._engine = engine

    def work(self, items: list[Detected]) -> list[Seen]:
        """Segment one batch."""
        (detected,) = items
        begin_ns = _begin(detected.frames, "masks")
        try:
            instances = self._engine.segment(detected.detections)
        finally:
            detected.detections.release()
        _end(detected.frames, "masks", begin_ns)
        return [Seen(*pair) for pair in zip(detected.frames, instances, strict=True)]


def _begin(frames: list[Frame], stage: str) -> int:
    """Stamp a batch: one start for all of its frames, by which it can be told that it was one."""
    frames[0].timeline.begin(stage)
    return frames[0].timeline.start_ns[stage]


def _end(frames: list[Frame], stage: str, begin_ns: int) -> None:
    frames[0].timeline.end(stage)
    for frame in frames:
        frame.timeline.start_ns[stage] = begin_ns
        frame.timeline.end_ns[stage] = frames[0].timeline.end_ns[stage]
