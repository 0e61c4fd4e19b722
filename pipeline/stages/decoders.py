"""Decoders: those of a running pipeline, which come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox, RoundRobin
from maskcast.pipeline.log import fields
from maskcast.pipeline.sources.open import check_address
from maskcast.pipeline.sources.state import REMOVED
from maskcast.pipeline.stages.decode import DecodeStage
from maskcast.pipeline.stages.stage import Event, PipelineContext

BLOCK_CAPACITY = 2
"""Frames that wait for each source that may not lose any: one in hand, one to come."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """One source.

    Attributes:
        removed: nobody wants it any more.
        told: its removal has been published, behind the last frame of it that was on its way.
        warned: the last reason for its silence that the log was told.
    """

    decoder: DecodeStage
    inbox: Inbox[Frame | Event]
    removed: bool = False
    told: bool = False
    warned: InputError | None = None


class Decoders:
    """A decoder and an inbox for each source, and one outlet behind them all. Thread-safe.

    A source that is removed keeps its name until its last frame and its ``ended`` are out and its
    thread has returned: whoever takes the name next begins with nothing of it.

    Args:
        configs: the first sources; their names are set.
        context: what they share with the stages; its meter already knows the first sources.
        stays: there may be no source left, and the outlet still waits for others.
        changed: the condition that all inboxes share.
        is_held: as of ``RoundRobin``: sources that may not lose a frame wait.

    Attributes:
        outlet: where frames and events of all sources come out, in turn.
    """

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        context: PipelineContext,
        *,
        stays: bool,
        changed: threading.Condition | None = None,
        is_held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._context = context
        self._stays = stays
        self._lock = threading.Lock()
        self._is_over = False
        self._changed = changed or threading.Condition()
        self.outlet: RoundRobin[Frame | Event] = RoundRobin(
            [], self._changed, open_end=stays, is_held=is_held
        )
        self._members: dict[str, _Member] = {}
        for config in configs:
            self._enter(config, required=True)

    def start(self) -> None:
        """Begin to read the first sources, unless the pipeline has been stopped already."""
        with self._lock:
            if not self._is_over:
                for member in self._members.values():
                    if member.decoder.ident is None:  # one that was added has been started
                        member.decoder.start()

    def add(self, config: SourceConfig) -> None:
        """Read one more source. That it cannot be read ends it alone.

        Raises:
            InputError: it has no name or one that is taken, its address is certainly wrong, or the
                pipeline is at its end.
        """
        name = config.name
        if name is None:
            raise InputError("a source that is added needs a name")
        check_address(config.url)
        with self._lock:
            if self._is_over:
                raise InputError("the pipeline is at its end and takes no more sources")
            if (member := self._members.get(name)) is not None:
                raise InputError(
                    f"the source {name!r} is still being removed; try again in a moment"
                    if member.removed
                    else f"there is a source {name!r} already; remove it first, or choose another "
                    "name"
                )
            self._context.meter.add(name)
            if not (decoder := self._enter(config, required=False)):
                self._context.meter.remove(name)
                raise InputError("the pipeline is at its end and takes no more sources")
            decoder.start()
        _logger.info("source_added", extra=fields(source=name, url=config.url))

    def remove(self, name: str) -> None:
        """Read a source no more. What waits of it is dropped; ``ended`` is published at last.

        Raises:
            InputError: there is no such source.
        """
        with self._lock:
            member = self._members.get(name)
            if member is None or member.removed:
                known = ", ".join(n for n, other in self._members.items() if not other.removed)
                raise InputError(f"there is no source {name!r}; there are: {known or 'none'}")
            member.removed = True
        member.decoder.stop()
        if not member.decoder.end(REMOVED, discard=True):
            # It had ended by itself, and its inbox was closed then: that it is removed comes last.
            member.inbox.add_last(Event(name, "ended", {"reason": REMOVED}))
            self.outlet.add(member.inbox)
        _logger.info("source_removed", extra=fields(source=name))

    def ended_events(self) -> list[Event]:
        """Return the ``ended`` of each that has ended."""
        with self._lock:
            words = [member.decoder.last_word for member in self._members.values()]
        return [word for word in words if word is not None]

    def names(self) -> list[str]:
        """Return the names of all, in the order in which they came."""
        with self._lock:
            return list(self._members)

    def is_lossless(self, name: str) -> bool:
        """Return whether a source waits for the pipeline instead of losing frames."""
        with self._lock:
            member = self._members.get(name)
        return member is not None and member.decoder.policy == "block"

    def configs(self) -> list[SourceConfig]:
        """Return what each is made from, with its name and, once it is open, its policy."""
        with self._lock:
            return [
                replace(member.decoder.config, policy=member.decoder.policy)
                for member in self._members.values()
            ]

    def on_removed(self, name: str) -> None:
        """Note that the last message of a removed source is published."""
        with self._lock:
            if (member := self._members.get(name)) is not None:
                member.told = True
        self.review()

    def review(self) -> None:
        """Forget removed sources that are gone, and give up hope where nothing else is left.

        A run ends when all that is left of it are sources that have never answered: a typing error
        in an address is told at once, and a run over files ends with the files; but a camera that
        comes late joins the others.
        """
        with self._lock:
            gone = [
                name
                for name, member in self._members.items()
                if member.told and member.decoder.has_returned
            ]
            for name in gone:
                del self._members[name]
                self._context.meter.remove(name)
            members = list(self._members.values())
        left = [member.decoder for member in members if not member.decoder.is_over]
        if not self._stays and all(decoder.unreachable for decoder in left):
            for decoder in left:
                decoder.abandon()
        else:
            for member in members:
                reason = member.decoder.unreachable
                if reason is not None and str(reason) != str(member.warned):
                    member.warned = reason
                    shown = fields(source=member.decoder.config.name, reason=reason)
                    _logger.warning("source_unreachable", extra=shown)

    def stop(self, reason: str) -> None:
        """Read nothing more, and take no more sources."""
        with self._lock:
            self._is_over = True
            members = list(self._members.values())
        for member in members:
            member.decoder.stop()
            member.decoder.end(reason, discard=True)
        self.outlet.close()

    def join(self, timeout_s: float) -> None:
        """Wait for the decoders; one that hangs in a read is left behind."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._is_over = True
            decoders = [member.decoder for member in self._members.values()]
        for decoder in decoders:
            if decoder.ident is not None:  # else it never began
                decoder.join(max(0.0, deadline_s - time.monotonic()))

    def startup_error(self) -> InputError | None:
        """Return why there was nothing to run on, if no source has ever answered."""
        with self._lock:
            reasons = [member.decoder.unreachable for member in self._members.values()]
        return reasons[0] if not self._stays and reasons and all(reasons) else None

    def _enter(self, config: SourceConfig, *, required: bool) -> DecodeStage | None:
        inbox: Inbox[Frame | Event] = Inbox(
            BLOCK_CAPACITY, on_drop=self._drop, changed=self._changed
        )
        decoder = DecodeStage(config, inbox, self._context, required=required)
        if not self.outlet.add(inbox):
            return None
        self._members[decoder.config.name or ""] = _Member(decoder, inbox)
        return decoder

    def _drop(self, item: Frame | Event, reason: str) -> None:
        assert isinstance(item, Frame)
        self._context.meter.dropped(item, "preprocess", reason)
