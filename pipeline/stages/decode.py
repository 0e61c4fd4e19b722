"""The decode stage: one thread for each source."""

from __future__ import annotations

import logging
import threading

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.log import fields
from maskcast.pipeline.orders import Failed, Review
from maskcast.pipeline.sources.open import open_source
from maskcast.pipeline.sources.source import Source, SourceLostError
from maskcast.pipeline.sources.state import SourceState, StateChange
from maskcast.pipeline.stages.frame_rate import thinnings
from maskcast.pipeline.stages.stage import Event, PipelineContext
from maskcast.pipeline.url import is_local

START_POLL_S = 0.05

_logger = logging.getLogger(__name__)


class DecodeStage(threading.Thread):
    """Opens a source, reads it to its end into its inbox, and closes it.

    Every change of the source's state goes into the inbox as an event, in line with its frames. The
    last item is always the source's ``ended`` event.

    Args:
        config: the source; its name is set.
        inbox: where frames go; it takes on the source's policy.
        context: what it shares with the stages. Until ``reading`` is set, files are not read, and
            frames of live sources are skipped and not counted; so are those that come before
            ``is_ready``. If a live source changes its shape later, frames are dropped until the
            engine is ready. ``Failed`` is sent for an unexpected error, and for a required file
            that cannot be read; ``Review`` when the source has ended or cannot be reached.
        required: that a file cannot be read is reported; else the source ends.

    Attributes:
        config: the source.
        unreachable: why a source that is not on this machine has never answered; it is still tried.
        policy: what happens to a frame that comes while another waits; None until that is known.
        last_word: its ``ended``, once it has said so.
        is_over: it has said that it has ended.
        has_returned: its thread counts nothing any more, and holds nothing open.
    """

    def __init__(
        self,
        config: SourceConfig,
        inbox: Inbox[Frame | Event],
        context: PipelineContext,
        *,
        required: bool = True,
    ) -> None:
        assert config.name is not None
        super().__init__(name=f"decode {config.name}", daemon=True)
        self.config = config
        self.unreachable: InputError | None = None
        self.policy = config.policy
        self.last_word: Event | None = None
        self.is_over = False
        self.has_returned = False
        self._required = required
        self._source_name = config.name
        self._inbox = inbox
        self._context = context
        self._state: SourceState | None = None
        self._has_answered = False
        self._thinnings = thinnings(config)
        self._stopping = threading.Event()
        self._source: Source | None = None

    def run(self) -> None:
        """Read until the source ends, breaks off, is stopped or has given its share."""
        corrupt = 0
        reason, detail = "failed", ""
        try:
            with open_source(self.config, self._note, self._stopping) as source:
                self._source = source
                if self._state is not SourceState.STREAMING:
                    self._note(StateChange(SourceState.STREAMING))
                self._context.meter.opened(self._source_name, self._frame_count(source))
                self.policy = self._inbox.policy = source.policy
                self._inbox.capacity = 1 if source.policy == "latest" else self._inbox.capacity
                try:
                    reason = self._read(source)
                finally:
                    corrupt = source.corrupt
        except SourceLostError as lost:
            if self._stopping.is_set():
                reason = "stopped"
            else:
                reason, detail = "lost", str(lost)
        except InputError as error:
            reason, detail = "unreachable", str(error)
            if not is_local(self.config.url):
                self.unreachable = error
            elif self._required:
                self._context.send(Failed(error))
        except BaseException as error:
            self._context.send(Failed(error))
        finally:
            self._source = None
            self.end(reason, detail, corrupt)
            self.has_returned = True
            self._context.send(Review())

    def stop(self) -> None:
        """Ask, from any thread, for the end. A read that hangs ends by the source's timeout."""
        self._stopping.set()
        if (source := self._source) is not None:
            source.stop()

    def abandon(self) -> None:
        """Try no longer to reach a source that has never answered."""
        self.stop()
        self.end("unreachable", str(self.unreachable or ""))

    def end(
        self, reason: str, detail: str = "", corrupt: int = 0, *, discard: bool = False
    ) -> bool:
        """Say that the source has ended, and take nothing more from it; the first call counts.

        Returns:
            Whether this was the first.
        """
        data = {"reason": reason, "detail": detail} if detail else {"reason": reason}
        last_word = Event(self._source_name, "ended", data)
        self.is_over = True
        if not self._inbox.close(last_word, discard=discard):
            return False
        self.last_word = last_word
        self._context.meter.ended(self._source_name, detail or reason, corrupt)
        # Of a failure, and of a required one that was not reached, an error tells by itself.
        bad = reason == "lost" or (reason == "unreachable" and not self._required)
        shown = fields(
            source=self._source_name, state=SourceState.ENDED, reason=reason, detail=detail or None
        )
        _logger.log(logging.WARNING if bad else logging.INFO, "source_state", extra=shown)
        return True

    def _read(self, source: Source) -> str:
        if not source.live:
            while not self._context.reading.wait(START_POLL_S):
                if self._stopping.is_set():
                    return "stopped"
        count = corrupt = 0
        has_begun = False
        for frame in source:
            if self._stopping.is_set():
                return "stopped"
            if not has_begun:
                if source.live and not (
                    self._context.is_ready(frame) and self._context.reading.is_set()
                ):
                    continue
                # A file that is played like a camera can wait.
                while self.policy == "latest" and not self._context.is_ready(frame):
                    if self._stopping.wait(START_POLL_S):
                        return "stopped"
                has_begun = True
            self._context.meter.captured(frame, source.corrupt)
            if source.corrupt > corrupt:
                corrupt = source.corrupt
                shown = fields(source=self._source_name, corrupt=corrupt)
                _logger.warning("source_damaged", extra=shown)
            if not self._is_wanted(frame):
                continue
            if self.policy == "latest" and not self._context.is_ready(frame):
                self._context.meter.dropped(frame, "decode", "engine_not_ready")
                continue
            if not self._inbox.put(frame):
                return "stopped"
            count += 1
            if count == self._context.limit:
                return "limit"
        return "stopped" if self._stopping.is_set() else "end of stream"

    def _is_wanted(self, frame: Frame) -> bool:
        start_s = frame.timeline.start_ns["decode"] / 1e9
        time_s = frame.pts_s if frame.pts_s is not None else start_s
        for thinning in self._thinnings:
            if not thinning.keeps(time_s):
                self._context.meter.dropped(frame, "decode", thinning.reason)
                return False
        return True

    def _note(self, change: StateChange) -> None:
        """Tell of a change of the source's state; ``end`` tells of its end."""
        if change.state is SourceState.ENDED:
            return
        self._state = change.state
        self._context.meter.changed(self._source_name, change)
        self._log(change)
        data: dict[str, str | int] = {"state": change.state, "reconnects": change.reconnects}
        if change.reason:
            data["reason"] = change.reason
        self._inbox.post(Event(self._source_name, "state", data))
        if change.state is SourceState.STREAMING:
            self._has_answered, self.unreachable = True, None
        elif change.state is SourceState.RECONNECTING and not self._has_answered:
            self.unreachable = InputError(change.reason)
            self._context.send(Review())

    def _log(self, change: StateChange) -> None:
        """Log a change of state.

        Whether a source that never answered is worth a warning, others decide: it may be an error.
        """
        trouble = change.state in (SourceState.STALLED, SourceState.RECONNECTING)
        shown = fields(
            source=self._source_name,
            state=change.state,
            reason=change.reason or None,
            reconnects=change.reconnects,
        )
        level = logging.WARNING if trouble and self._has_answered else logging.INFO
        _logger.log(level, "source_state", extra=shown)

    def _frame_count(self, source: Source) -> int | None:
        counts = [count for count in (source.frame_count, self._context.limit) if count is not None]
        return min(counts, default=None)
