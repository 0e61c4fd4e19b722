"""PresentationClock: increasing times for the frames of a live stream."""

from __future__ import annotations

LARGEST_STEP_S = 10.0
"""A larger step between two frames is treated as a jump of the stream's clock."""


class PresentationClock:
    """Gives every frame of a source a presentation time, seconds from 0, strictly increasing.

    While the stream's own times increase, these increase by the same steps. If a time is missing,
    repeats, goes back or jumps, for example after a reconnect or a wrap, the step is the time that
    passed on the receiver's clock, and the next steps are the stream's again.

    FFmpeg gives the first frame of an RTSP connection no time, and delivers it together with the
    frames behind it: the step to the second one is at least the nominal interval.
    """

    def __init__(self) -> None:
        self._stream_s: float | None = None
        self._arrival_s: float | None = None
        self._time_s = 0.0

    def reconnect(self) -> None:
        """Expect times of another connection, which have nothing to do with those before."""
        self._stream_s = None

    def time_s(
        self, stream_s: float | None, arrival_s: float, interval_s: float | None = None
    ) -> float:
        """Return the time of the next frame.

        Args:
            stream_s: its time in the stream's clock, None if it has none.
            arrival_s: when it arrived, seconds of a clock that never goes back.
            interval_s: the nominal time between two frames, None if unknown.
        """
        if self._arrival_s is not None:
            step_s = self._step_s(stream_s)
            if step_s is None:
                step_s = max(1e-3, arrival_s - self._arrival_s)
                if self._stream_s is None and stream_s is not None:
                    step_s = max(step_s, interval_s or 0.0)
            self._time_s += step_s
        self._stream_s, self._arrival_s = stream_s, arrival_s
        return self._time_s

    def _step_s(self, stream_s: float | None) -> float | None:
        if stream_s is None or self._stream_s is None:
            return None
        step_s = stream_s - self._stream_s
        return step_s if 1e-6 < step_s <= LARGEST_STEP_S else None
