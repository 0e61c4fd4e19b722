"""Decoders: the decode stages of a pipeline; sources can be added and removed at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from msgspec.structs import replace

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox, RoundRobin
from maskcast.pipeline.log import fields
from maskcast.pipeline.sources.open import check_source
from maskcast.pipeline.sources.state import REMOVED
from maskcast.pipeline.stages.decode import DecodeStage
from maskcast.pipeline.stages.stage import Event, PipelineContext

BLOCK_CAPACITY = 2
"""Capacity of a source's inbox with the policy ``block``: one frame to take and the next one."""

_ENDING = "the pipeline is ending and accepts no more sources"

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """One source.

    Attributes:
        added: whether it was added by ``add``; then its errors are not errors of the run.
        removed: whether it was removed by ``remove``.
        is_published: whether its removal has been published, after its last frame.
        reported: whether the log says that it could not be read.
    """

    decoder: DecodeStage
    inbox: Inbox[Frame | Event]
    added: bool = False
    removed: bool = False
    is_published: bool = False
    reported: bool = False


class Decoders:
    """A decoder and an inbox for each source, and one outlet for all of them. Thread-safe.

    A removed source keeps its name until its last frame and its ``ended`` event are published and
    its thread has returned, so that nothing of it is attributed to a new source of that name.

    Args:
        configs: the first sources; their names are set.
        context: shared with the stages; its meter already knows the first sources.
        open_end: keep the outlet open when no source is left, because others may be added.
        changed: the condition that all inboxes share.
        is_held: as in ``RoundRobin``: while it returns True, sources with ``block`` wait.

    Attributes:
        outlet: where the frames and events of all sources are taken from, in turn.
    """

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        context: PipelineContext,
        *,
        open_end: bool,
        changed: threading.Condition | None = None,
        is_held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._context = context
        self._open_end = open_end
        self._lock = threading.Lock()
        self._is_over = self._is_stopped = False
        self._changed = changed or threading.Condition()
        self.outlet: RoundRobin[Frame | Event] = RoundRobin(
            [], self._changed, open_end=open_end, is_held=is_held
        )
        self._members: dict[str, _Member] = {}
        for config in configs:
            self._enter(config)

    def start(self) -> None:
        """Start reading the first sources, unless the pipeline has already been stopped."""
        with self._lock:
            if not self._is_over:
                for member in self._members.values():
                    if member.decoder.ident is None:  # ``add`` has started the others
                        member.decoder.start()

    def add(self, config: SourceConfig) -> None:
        """Read one more source. If it cannot be read, only this source ends.

        Raises:
            InputError: it has no name or one that is taken, ``check_source`` rejects it, or the
                pipeline is ending.
        """
        name = config.name
        if name is None:
            raise InputError("a source that is added needs a name")
        check_source(config)
        with self._lock:
            if self._is_over:
                raise InputError(_ENDING)
            if (member := self._members.get(name)) is not None:
                raise InputError(
                    f"the source {name!r} is still being removed; try again in a moment"
                    if member.removed
                    else f"there is a source {name!r} already; remove it first, or choose another "
                    "name"
                )
            self._context.meter.add(name)
            if not (decoder := self._enter(config, added=True)):
                self._context.meter.remove(name)
                raise InputError(_ENDING)
            decoder.start()
        _logger.info("source_added", extra=fields(source=name, url=config.url))

    def remove(self, name: str) -> None:
        """Remove a source: drop its waiting frames, then publish ``ended``.

        Raises:
            InputError: there is no such source.
        """
        with self._lock:
            member = self._members.get(name)
            if member is None or member.removed:
                known = ", ".join(n for n, other in self._members.items() if not other.removed)
                raise InputError(f"there is no source {name!r}; there are: {known or 'none'}")
            member.removed = True
        is_first = member.decoder.end(REMOVED, discard=True)
        member.decoder.stop()
        if not is_first:
            # It had already ended and closed its inbox: its removal is one more event.
            member.inbox.add_last(Event(name, "ended", {"reason": REMOVED}))
            self.outlet.add(member.inbox)
        _logger.info("source_removed", extra=fields(source=name))

    def ended_events(self) -> list[Event]:
        """Return the ``ended`` event of each source that has ended."""
        with self._lock:
            events = [member.decoder.ended_event for member in self._members.values()]
        return [event for event in events if event is not None]

    def names(self) -> list[str]:
        """Return the names of all sources, in the order in which they were added."""
        with self._lock:
            return list(self._members)

    def is_lossless(self, name: str) -> bool:
        """Return whether a source waits for the pipeline instead of losing frames."""
        with self._lock:
            member = self._members.get(name)
        return member is not None and member.decoder.policy == "block"

    def configs(self) -> list[SourceConfig]:
        """Return the configuration of each source, with its name and, once known, its policy."""
        with self._lock:
            return [
                replace(member.decoder.config, policy=member.decoder.policy)
                for member in self._members.values()
            ]

    def on_removed(self, name: str) -> None:
        """Note that the last message of a removed source is published."""
        with self._lock:
            if (member := self._members.get(name)) is not None:
                member.is_published = True
        self.review()

    def review(self) -> None:
        """Delete removed sources that are gone, and log sources that could not be read.

        They are logged only while other sources are running. When none is left, the run ends with
        ``startup_error``.
        """
        with self._lock:
            gone = [
                name
                for name, member in self._members.items()
                if member.is_published and member.decoder.has_returned
            ]
            for name in gone:
                del self._members[name]
                self._context.meter.remove(name)
            members = list(self._members.values())
        if not self._open_end and all(member.decoder.is_over for member in members):
            self._context.reading.set()  # do not wait for subscribers any longer
            return
        for member in members:
            error = member.decoder.error
            if isinstance(error, InputError) and not member.reported:
                member.reported = True
                shown = fields(source=member.decoder.config.name, reason=str(error))
                _logger.error("source_unreadable", extra=shown)

    def stop(self, reason: str) -> None:
        """Stop all sources, and accept no more."""
        with self._lock:
            self._is_over = self._is_stopped = True
            members = list(self._members.values())
        with ExitStack() as steps:  # after an error in one step, the others still run
            steps.callback(self.outlet.close)
            for member in reversed(members):
                steps.callback(member.decoder.stop)
                steps.callback(member.decoder.end, reason, discard=True)

    def join(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` for the decoders; abandon those that hang in a read."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._is_over = True
            decoders = [member.decoder for member in self._members.values()]
        for decoder in decoders:
            if decoder.ident is not None:  # otherwise it was never started
                decoder.join(max(0.0, deadline_s - time.monotonic()))

    def startup_error(self) -> Exception | None:
        """Return why a source could not be read, or failed; None after ``stop``.

        A run that ends by itself fails with the error of the first source that has one.
        """
        with self._lock:
            if self._open_end or self._is_stopped:
                return None
            errors = [member.decoder.error for member in self._members.values() if not member.added]
        return next((error for error in errors if error is not None), None)

    def _enter(self, config: SourceConfig, *, added: bool = False) -> DecodeStage | None:
        inbox: Inbox[Frame | Event] = Inbox(
            BLOCK_CAPACITY, on_drop=self._drop, changed=self._changed
        )
        decoder = DecodeStage(config, inbox, self._context)
        if not self.outlet.add(inbox):
            return None
        self._members[decoder.config.name or ""] = _Member(decoder, inbox, added)
        return decoder

    def _drop(self, item: Frame | Event, reason: str) -> None:
        assert isinstance(item, Frame)
        self._context.meter.dropped(item, "preprocess", reason)
