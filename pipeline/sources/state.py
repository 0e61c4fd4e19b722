"""SourceState: the states of a source and the transitions between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

REMOVED = "removed"
"""End reason of a source that was removed while the pipeline was running."""

MOVED = "moved"
"""End reason of a source that another pipeline has taken over. It is not published, so that
subscribers do not take it for the end of the source."""

FINISHED = frozenset({"end of stream", "limit"})
"""End reasons of a source that has delivered all of its frames."""


class SourceState(StrEnum):
    """What a source is doing."""

    CONNECTING = "connecting"
    STREAMING = "streaming"
    STALLED = "stalled"
    RECONNECTING = "reconnecting"
    ENDED = "ended"


_NEXT: dict[SourceState, frozenset[SourceState]] = {
    SourceState.CONNECTING: frozenset(
        {SourceState.STREAMING, SourceState.RECONNECTING, SourceState.ENDED}
    ),
    SourceState.STREAMING: frozenset(
        {SourceState.STALLED, SourceState.RECONNECTING, SourceState.ENDED}
    ),
    SourceState.STALLED: frozenset(
        {SourceState.STREAMING, SourceState.RECONNECTING, SourceState.ENDED}
    ),
    SourceState.RECONNECTING: frozenset({SourceState.STREAMING, SourceState.ENDED}),
    SourceState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class StateChange:
    """A source's new state.

    Attributes:
        state: the new state.
        reason: why, one line without credentials; "" if there is nothing to say.
        reconnects: number of successful reconnects so far.
    """

    state: SourceState
    reason: str = ""
    reconnects: int = 0


OnStateChange = Callable[[StateChange], None]


class StateMachine:
    """Follows a source's state and reports every change.

    A source is ``connecting`` until its first frame, and then ``streaming``. Silence makes it
    ``stalled`` and a failure makes it ``reconnecting``, until the next frame. A new reason for
    ``reconnecting`` is also reported: "connection refused", and later "access denied".

    Attributes:
        state: the current state.

    Args:
        silence_s: seconds without a frame after which a source is stalled.
        on_change: called with every change.
    """

    def __init__(self, silence_s: float, on_change: OnStateChange) -> None:
        self._silence_s = silence_s
        self._on_change = on_change
        self._reason = ""
        self._has_streamed = False
        self._reconnects = 0
        self.state = SourceState.CONNECTING

    def begin(self) -> None:
        """Report the first state, ``connecting``."""
        self._on_change(StateChange(self.state))

    def frame(self) -> None:
        """Note that a frame has arrived."""
        if self.state is SourceState.STREAMING:
            return
        if self.state is SourceState.RECONNECTING and self._has_streamed:
            self._reconnects += 1
        self._has_streamed = True
        self._become(SourceState.STREAMING)

    def silent(self, for_s: float) -> None:
        """Note that no frame has arrived for ``for_s`` seconds."""
        if self.state is SourceState.STREAMING and for_s >= self._silence_s:
            self._become(SourceState.STALLED, f"no frame for {for_s:.1f} s")

    def lost(self, reason: str) -> None:
        """Note that a connection was lost or could not be made."""
        if (self.state, self._reason) != (SourceState.RECONNECTING, reason):
            self._become(SourceState.RECONNECTING, reason)

    def end(self, reason: str) -> None:
        """Note that the source has ended."""
        if self.state is not SourceState.ENDED:
            self._become(SourceState.ENDED, reason)

    def _become(self, state: SourceState, reason: str = "") -> None:
        if state not in _NEXT[self.state] and state is not self.state:
            raise RuntimeError(f"a source that is {self.state} cannot become {state}")
        self.state, self._reason = state, reason
        self._on_change(StateChange(state, reason, self._reconnects))
