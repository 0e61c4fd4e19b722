"""The preprocess stage: frames to network images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import av.error

from maskcast.engines.bundle import Manifest
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.stages.stage import Event, Outlet, PipelineContext, Stage
from maskcast.pipeline.url import shorten

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frame and the network's input made from it."""

    frame: Frame
    image: NetworkImage


class PreprocessStage(Stage[Frame, Prepared]):
    """Resizes, pads and converts one frame after the other to RGB, and begins its upload.

    A frame that cannot be converted, for example a damaged one, is dropped and counted.
    """

    def __init__(
        self,
        inbox: Outlet[Frame | Event],
        outbox: Inbox[Prepared | Event],
        manifest: Manifest,
        prefetch: Callable[[NetworkImage], None],
        context: PipelineContext,
    ) -> None:
        super().__init__("preprocess", inbox, outbox, context)
        self._manifest = manifest
        self._prefetch = prefetch

    def work(self, items: list[Frame]) -> list[Prepared]:
        """Prepare the one frame."""
        (frame,) = items
        frame.timeline.begin("preprocess")
        try:
            image = fit_image(frame.decoded, frame.rotation, self._manifest.input)
        except (av.error.FFmpegError, MemoryError, OverflowError, ValueError) as error:
            self._context.meter.dropped(frame, "preprocess", "unreadable")
            shown = fields(source=frame.source, index=frame.index, reason=shorten(str(error)))
            _logger.warning("frame_unreadable", extra=shown)
            return []
        self._prefetch(image)
        frame.timeline.end("preprocess")
        return [Prepared(frame, image)]
