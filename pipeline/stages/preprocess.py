"""The preprocess stage: pictures to network images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import av.error

from maskcast.engines.bundle import Manifest
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.stages.stage import Event, Outlet, PipelineContext, Stage


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frame and what the network is shown of it."""

    frame: Frame
    image: NetworkImage


class PreprocessStage(Stage[Frame, Prepared]):
    """Resizes, pads and converts one picture after the other to RGB, and begins its upload.

    A picture that cannot be converted, as the damaged ones of a bad line, is dropped and counted.
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
            image = fit_image(frame.picture, frame.rotation, self._manifest.input)
        except av.error.FFmpegError:
            self._context.meter.dropped(frame, "preprocess", "unreadable")
            return []
        self._prefetch(image)
        frame.timeline.end("preprocess")
        return [Prepared(frame, image)]
