"""Record stage: hands published frames to the recorders and to ``on_frame``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import av

from maskcast.engines.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.outputs.recorder import Published, Recorder, SourceEnding
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.stats import RECORD

RETRY_S = 10.0
"""An output that could not be written is tried again after this long."""

OnFrame = Callable[[Frame, Instances, Published], None]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A published frame on its way to the outputs."""

    frame: Frame
    instances: Instances
    published: Published


@dataclass(slots=True)
class _Output:
    """A recorder, and when and why it last failed; None and "" while it works."""

    name: str
    recorder: Recorder
    failed_s: float | None = None
    problem: str = ""


class RecordStage(Stage[Recorded, None]):
    """Writes files and calls ``on_frame``, behind the publish stage, which never waits for it.

    An output that cannot be written (disk full, folder gone, permission lost) is paused: one line
    in the log, a state in ``/healthz`` and the metrics, and another try every ``RETRY_S``. The
    other outputs and the pipeline run on. Errors of ``on_frame``, and any other error, end the run.

    Args:
        inbox: published frames, and ``ended`` events.
        recorders: get every frame; closed at the end, each once.
        on_frame: called with every frame.
        context: as of ``Stage``.
        clock_s: a monotonic clock.
    """

    def __init__(
        self,
        inbox: Inbox[Recorded | Event],
        recorders: Sequence[Recorder],
        on_frame: OnFrame | None,
        context: PipelineContext,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(RECORD, inbox, None, context)
        self._outputs = [
            _Output(getattr(recorder, "name", type(recorder).__name__), recorder)
            for recorder in recorders
        ]
        self._on_frame = on_frame
        self._clock_s = clock_s
        for output in self._outputs:
            context.meter.output(output.name)

    def work(self, items: list[Recorded]) -> list[None]:
        """Write one frame to every output."""
        (item,) = items
        timeline = item.frame.timeline
        timeline.begin(RECORD)
        written = [self._write(output, item) for output in self._outputs]
        if self._on_frame is not None:
            self._on_frame(item.frame, item.instances, item.published)
        timeline.end(RECORD)
        self._context.meter.recorded(item.frame)
        if not all(written):
            self._context.meter.unrecorded(item.frame, "failed")
        return []

    def event(self, event: Event) -> None:
        """Finish the files of a source that has ended."""
        if event.name == "ended":
            for output in self._outputs:
                if isinstance(output.recorder, SourceEnding):
                    try:
                        output.recorder.end_source(event.source)
                    except (OSError, av.FFmpegError) as error:
                        self._pause(output, error)

    def close(self) -> None:
        """Close every recorder, even if closing another one fails."""
        with ExitStack() as closing:
            for output in self._outputs:
                closing.callback(self._close, output)

    def _write(self, output: _Output, item: Recorded) -> bool:
        if output.failed_s is not None and self._clock_s() - output.failed_s < RETRY_S:
            return False
        try:
            output.recorder.write(item.frame, item.instances, item.published)
        except (OSError, av.FFmpegError) as error:
            self._pause(output, error)
            return False
        if output.failed_s is not None:
            output.failed_s, output.problem = None, ""
            self._context.meter.output(output.name)
            _logger.warning("recording_resumed", extra=fields(output=output.name))
        return True

    def _pause(self, output: _Output, error: Exception) -> None:
        """Pause an output after a failure, and log it if the reason is new."""
        reason = getattr(error, "strerror", None) or str(error)
        if reason != output.problem:
            shown = fields(output=output.name, reason=reason, file=getattr(error, "filename", None))
            _logger.error("recording_failed", extra=shown)
        output.failed_s, output.problem = self._clock_s(), reason
        self._context.meter.output(output.name, reason)

    def _close(self, output: _Output) -> None:
        try:
            output.recorder.close()
        except (OSError, av.FFmpegError) as error:
            self._pause(output, error)
