"""Record stage: passes published frames to the recorders and to ``on_frame``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import av

from maskcast.engines.instances.instances import Instances
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.outputs.hanging import HANGS_AFTER_S, HangWatch
from maskcast.pipeline.outputs.recorder import Published, Recorder, SourceEnding
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.stats import RECORD

RETRY_S = 10.0
"""An output that could not be written is retried after this long."""

FINISH_S = 1.0
"""Time to finish the other outputs when one is abandoned; they may be on the same drive."""

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
    """A recorder, and when and why it last failed; None and "" while it is not paused."""

    name: str
    recorder: Recorder
    failed_s: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an output that has not returned."""

    output: _Output


class RecordStage(Stage[Recorded, None]):
    """Writes files and calls ``on_frame``. The publish stage never waits for it.

    An output that cannot be written (disk full, folder gone, permission lost) is paused and retried
    every ``RETRY_S``. This is logged, and shown in ``/healthz`` and the metrics. The other outputs
    and the pipeline continue. Errors of ``on_frame``, and any other error, end the run.

    A write may hang on a dead network drive or in a pipe that nobody reads. Such an output is
    abandoned so that the run can end (``abandon_hanging``).

    Args:
        inbox: published frames, and ``ended`` events.
        recorders: receive every frame; each is closed once, at the end.
        on_frame: called with every frame; None for none.
        context: as in ``Stage``.
        clock_s: returns monotonic seconds.
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
        self._lock = threading.Lock()
        self._call: _Call | None = None
        self._abandoned: _Output | None = None
        self._watch = HangWatch(self)
        mark_abandonable(self)
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
        if event.name != "ended":
            return
        for output in self._outputs:
            if isinstance(output.recorder, SourceEnding):
                self._use(output, partial(output.recorder.end_source, event.source))

    def close(self) -> None:
        """Close every recorder, even if closing another one fails."""
        with ExitStack() as closing:
            for output in self._outputs:
                closing.callback(self._use, output, output.recorder.close)

    def abandon_hanging(self) -> bool:
        """Abandon an output whose write hangs, and finish the others. For the supervisor.

        Call it repeatedly while the run ends: it takes a second to detect that a write hangs.

        Returns:
            Whether an output was abandoned; do not wait for the stage's thread then.
        """
        call = self._call
        if not self._watch.hangs(call) or call is None:
            return False
        with self._lock:
            if self._call is not call:
                return False  # it has just returned
            self._abandoned = call.output
        reason = f"a write has hung for {HANGS_AFTER_S:g} s or more, and the run ends"
        shown = fields(output=call.output.name, reason=reason)
        _logger.error("recording_abandoned", extra=shown)
        self._context.meter.output(call.output.name, reason)
        others = [output for output in self._outputs if output is not call.output]
        finishing = threading.Thread(target=self._finish, args=(others,), daemon=True)
        mark_abandonable(finishing)
        finishing.start()
        finishing.join(FINISH_S)
        return True

    def _finish(self, outputs: Sequence[_Output]) -> None:
        for output in outputs:
            try:
                output.recorder.close()
            except (OSError, av.FFmpegError) as error:
                self._pause(output, error)

    def _use(self, output: _Output, call: Callable[[], None]) -> bool:
        """Call an output; return whether the call succeeded.

        After an output is abandoned, do nothing for the others: another thread finishes them.
        """
        with self._lock:
            if self._abandoned not in (None, output):
                return False
            self._call = _Call(output)
        try:
            call()
        except (OSError, av.FFmpegError) as error:
            self._pause(output, error)
            return False
        finally:
            self._call = None
        return True

    def _write(self, output: _Output, item: Recorded) -> bool:
        if output.failed_s is not None and self._clock_s() - output.failed_s < RETRY_S:
            return False
        write = output.recorder.write
        if not self._use(output, partial(write, item.frame, item.instances, item.published)):
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
