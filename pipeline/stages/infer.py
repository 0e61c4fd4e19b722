"""Infer stage: detects the boxes of the instances in frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections, Engine, Mode
from maskcast.engines.load import load_engine
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.configuration.config import Config, ModelConfig
from maskcast.pipeline.configuration.labels import label_of
from maskcast.pipeline.frame import Frame, begin_batch, end_batch
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.sources.open import is_live
from maskcast.pipeline.stages.preprocess import Prepared
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage


def load_engine_for(config: Config, bundle: Bundle | None = None) -> Engine:
    """Load the engine of a configuration.

    Args:
        config: names the bundle, the engine and the mode, and whether poses are estimated.
        bundle: the configured bundle, if it is already open; its files are not checked again.

    Raises:
        InputError: there is no such bundle or engine, or the engine cannot run the bundle.
    """
    model = config.model
    return load_engine(
        bundle or model.bundle,
        model.engine,
        mode_for(config),
        pose=model.pose,
        spin=model.spin,
    )


def mode_for(config: Config) -> Mode:
    """Return the configured mode; by default ``latency`` if a source is, or may become, live."""
    if config.model.mode != "auto":
        return config.model.mode
    may_be_live = config.control is not None or any(map(is_live, config.sources))
    return "latency" if may_be_live else "throughput"


def min_score_for(engine: Engine, model: ModelConfig) -> float:
    """Return the minimum score, 0..1: the configured one, or the bundle's."""
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
    return np.array([label_of(name, label_names, "model.classes") for name in classes], np.int32)


def select(detections: Detections, labels: NDArray[np.int32]) -> Detections:
    """Return the detections of these labels; the features still cover the whole batch."""
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


class InferStage(Stage[Prepared, Detected]):
    """Detects boxes in batches: as many waiting frames of one shape as the engine accepts."""

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
        """Tell whether two images have the same shape."""
        return first.image.shape == other.image.shape

    def work(self, items: list[Prepared]) -> list[Detected]:
        """Detect the boxes in one batch."""
        frames = [item.frame for item in items]
        begin_ns = begin_batch(frames, "infer")
        detections = self._engine.detect([item.image for item in items], self._min_score)
        if self._labels is not None:
            detections = select(detections, self._labels)
        end_batch(frames, "infer", begin_ns)
        return [Detected(frames, detections)]
