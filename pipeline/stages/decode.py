"""The decode stage: one thread for each source."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from maskcast.engines.errors import InputError
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.orders import Review
from maskcast.pipeline.outputs.audio import audio_file
from maskcast.pipeline.sources.ffmpeg import decode_device, device_problem
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import Source, SourceLostError
from maskcast.pipeline.sources.state import FINISHED, SourceState, StateChange
from maskcast.pipeline.stages.frame_rate import frame_rate_limiters
from maskcast.pipeline.stages.stage import Event, PipelineContext
from maskcast.pipeline.url import redact

START_POLL_S = 0.02

_logger = logging.getLogger(__name__)


class DecodeStage(threading.Thread):
    """Opens a source, reads it to its end into its inbox, and closes it.

    Every change of the source's state goes into the inbox as an event, in order with its frames.
    The last item is always the source's ``ended`` event. Any error of the source, expected or not,
    ends this source alone.

    Args:
        config: the source; its name is set.
        inbox: receives the frames and events; its policy is set to the source's.
        context: shared with the stages. A source begins when ``reading`` is set and the engine
            ``is_ready`` for its first frame: a file waits for both; earlier frames of a live
            source are skipped and not counted. If the shape of a live source changes later, frames
            are dropped until the engine is ready again. ``Review`` is sent when the source has
            ended.

    Attributes:
        config: the source.
        policy: what happens to a frame that arrives while another waits; None until it is known.
        ended_event: its ``ended`` event; None until then.
        error: why it could not be opened, or failed unexpectedly; None otherwise.
        is_over: whether it has ended.
        has_returned: whether its thread has closed the source and updates no more counters.
    """

    def __init__(
        self, config: SourceConfig, inbox: Inbox[Frame | Event], context: PipelineContext
    ) -> None:
        assert config.name is not None
        super().__init__(name=f"decode {config.name}", daemon=True)
        mark_abandonable(self)
        self.config = config
        self.policy = config.policy
        self.ended_event: Event | None = None
        self.error: Exception | None = None
        self.is_over = False
        self.has_returned = False
        self._source_name = config.name
        self._inbox = inbox
        self._context = context
        self._state: SourceState | None = None
        self._has_answered = False
        self._skipped = 0
        self._device = decode_device(config, context.decode_device)
        self._is_decoder_logged = False
        self._limiters = frame_rate_limiters(config)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Read until the source ends, fails, is stopped or reaches the limit."""
        corrupt = 0
        reason, detail = "failed", ""
        try:
            config = replace(self.config, decode=self._device or "software")
            with create_source(config, self._on_change, self._stopping) as source:
                if self._state is not SourceState.STREAMING:
                    self._on_change(StateChange(SourceState.STREAMING))
                self._context.meter.opened(self._source_name, self._frame_count(source))
                if self._context.saves_video and source.has_audio:
                    self._check_audio()
                self.policy = source.policy
                self._inbox.set_policy(source.policy)
                try:
                    reason = self._read(source)
                finally:
                    corrupt = source.corrupt
        except SourceLostError as lost:
            reason, detail = "lost", str(lost)
        except InputError as error:
            reason, detail, self.error = "unreachable", str(error), error
        except Exception as error:
            detail, self.error = f"unexpected {type(error).__name__}", error
            _logger.exception("source_failed", extra=fields(source=self._source_name))
        finally:
            if self._stopping.is_set() and reason not in FINISHED:
                reason, detail, self.error = "stopped", "", None
            self.end(reason, detail, corrupt)
            self.has_returned = True
            self._context.send(Review())

    def stop(self) -> None:
        """Ask the source to end. Thread-safe. A read that hangs ends with its timeout."""
        self._stopping.set()

    def end(
        self, reason: str, detail: str = "", corrupt: int = 0, *, discard: bool = False
    ) -> bool:
        """Mark the source as ended and close its inbox. Only the first call has an effect.

        Args:
            reason: why it ended, as published and logged.
            detail: the error, if there was one.
            corrupt: damaged packets, or unreadable images, that were skipped.
            discard: drop the frames that wait in the inbox.

        Returns:
            Whether this was the first call.
        """
        data = {"reason": reason}
        if detail:
            data["detail"] = self._without_address(detail)
        ended_event = Event(self._source_name, "ended", data)
        self.is_over = True
        if not self._inbox.close(ended_event, discard=discard):
            return False
        self.ended_event = ended_event
        self._context.meter.ended(self._source_name, detail or reason, corrupt)
        # ``Decoders`` decides whether an unreadable source is an error of the whole run.
        level = logging.WARNING if reason == "lost" else logging.INFO
        shown = fields(
            source=self._source_name, state=SourceState.ENDED, reason=reason, detail=detail or None
        )
        _logger.log(level, "source_state", extra=shown)
        return True

    def _read(self, source: Source) -> str:
        """Put the source's frames into the inbox; return the reason with which it ended."""
        context = self._context
        if not source.live and not self._wait(context.reading.is_set):
            return "stopped"
        count = corrupt = 0
        first_index: int | None = None
        first_pts_s = 0.0
        for frame in source:
            if self._stopping.is_set():
                return "stopped"
            self._check_decoder(frame)
            if first_index is None:
                if source.live and not (context.is_ready(frame) and context.reading.is_set()):
                    continue
                if not source.live:
                    if not self._wait(partial(context.is_ready, frame)):
                        return "stopped"
                    frame.restart_clock()
                first_index, first_pts_s = frame.index, frame.pts_s or 0.0
            if source.live and first_index:  # frames skipped at the start are not counted
                frame.index -= first_index
                frame.pts_s = None if frame.pts_s is None else frame.pts_s - first_pts_s
            context.meter.captured(frame, source.corrupt)
            if source.corrupt > corrupt:
                corrupt = source.corrupt
                shown = fields(source=self._source_name, corrupt=corrupt)
                _logger.warning("source_damaged", extra=shown)
            if not self._is_wanted(frame):
                continue
            if self.policy == "latest" and not context.is_ready(frame):
                context.meter.dropped(frame, "decode", "engine_not_ready")
                continue
            if not self._inbox.put(frame):
                return "stopped"
            count += 1
            if count == context.limit:
                return "limit"
        return "stopped" if self._stopping.is_set() else "end of stream"

    def _check_audio(self) -> None:
        """Log that a source's audio will be missing in saved video."""
        if audio_file(self.config) is None:
            reason = "audio is copied from video files only, not from looped ones"
            shown = fields(source=self._source_name, reason=reason)
            _logger.warning("audio_not_recorded", extra=shown)

    def _check_decoder(self, frame: Frame) -> None:
        """Log once that a source is decoded in software and not by the device."""
        device = self._device
        if self._is_decoder_logged or device is None or frame.decoder == device:
            return
        self._is_decoder_logged = True
        reason = device_problem(device) or "the device does not decode this video"
        shown = fields(source=self._source_name, device=device, reason=reason)
        if self.config.decode == "auto":
            _logger.info("decoded_in_software", extra=shown)
        else:
            _logger.warning("decoded_in_software", extra=shown)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if the source is stopped first."""
        while not condition():
            if self._stopping.wait(START_POLL_S):
                return False
        return True

    def _is_wanted(self, frame: Frame) -> bool:
        start_s = frame.timeline.start_ns["decode"] / 1e9
        time_s = frame.pts_s if frame.pts_s is not None else start_s
        for limiter in self._limiters:
            if not limiter.keeps(time_s):
                self._context.meter.skipped(frame, limiter.reason)
                self._skipped += 1
                return False
        frame.skipped = self._skipped
        return True

    def _on_change(self, change: StateChange) -> None:
        """Report a change of the source's state; ``end`` reports its end."""
        if change.state is SourceState.ENDED:
            return
        self._state = change.state
        self._has_answered |= change.state is SourceState.STREAMING
        self._context.meter.changed(self._source_name, change)
        self._log(change)
        data: dict[str, str | int] = {"state": change.state, "reconnects": change.reconnects}
        if change.reason:
            data["reason"] = self._without_address(change.reason)
        self._inbox.post(Event(self._source_name, "state", data))

    def _without_address(self, text: str) -> str:
        """Return a reason without the source's address, which subscribers do not need to know."""
        return text.removeprefix(f"{redact(self.config.url)}: ")

    def _log(self, change: StateChange) -> None:
        if change.state is SourceState.RECONNECTING and not self._has_answered:
            shown = fields(source=self._source_name, reason=change.reason)
            _logger.warning("source_unreachable", extra=shown)
            return
        is_trouble = change.state in (SourceState.STALLED, SourceState.RECONNECTING)
        shown = fields(
            source=self._source_name,
            state=change.state,
            reason=change.reason or None,
            reconnects=change.reconnects,
        )
        level = logging.WARNING if is_trouble else logging.INFO
        _logger.log(level, "source_state", extra=shown)

    def _frame_count(self, source: Source) -> int | None:
        counts = [count for count in (source.frame_count, self._context.limit) if count is not None]
        return min(counts, default=None)
