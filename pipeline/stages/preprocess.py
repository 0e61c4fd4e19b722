"""Preprocess stage: converts frames to the network's input."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import av.error

from maskcast.engines.engine import Engine
from maskcast.engines.image import NetworkImage
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.stages.stage import Event, Outlet, PipelineContext, Stage
from maskcast.pipeline.url import shorten

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frame and the network input made from it."""

    frame: Frame
    image: NetworkImage


class PreprocessStage(Stage[Frame, Prepared]):
    """Converts one frame after another to the network's input, and starts its upload.

    A frame that cannot be converted, for example because it is damaged, is dropped and counted.
    """

    def __init__(
        self,
        inbox: Outlet[Frame | Event],
        outbox: Inbox[Prepared | Event],
        engine: Engine,
        context: PipelineContext,
    ) -> None:
        super().__init__("preprocess", inbox, outbox, context)
        self._engine = engine

    def work(self, items: list[Frame]) -> list[Prepared]:
        """Convert one frame."""
        (frame,) = items
        frame.timeline.begin("preprocess")
        try:
            image = self._engine.fit(frame.decoded, frame.rotation)
        except (av.error.FFmpegError, MemoryError, OverflowError, ValueError) as error:
            self._context.meter.dropped(frame, "preprocess", "unreadable")
            shown = fields(source=frame.source, index=frame.index, reason=shorten(str(error)))
            _logger.warning("frame_unreadable", extra=shown)
            return []
        self._engine.prefetch(image)
        frame.timeline.end("preprocess")
        return [Prepared(frame, image)]
