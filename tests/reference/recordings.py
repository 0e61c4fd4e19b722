"""Messages for recordings, and functions that run during a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from publishers import seen

from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    encode,
)


class Background:
    """Runs a function on a thread; leaving waits for it and raises its error."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        self._run = run
        self._thread = threading.Thread(target=self._target)

    def _target(self) -> None:
        try:
            self.result = self._run()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(200)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


def made(choices: list[tuple[str, str, int, bytes]]) -> list[list[bytes]]:
    """Return the messages of a publisher, with gaps in its numbers and an end of each source."""
    seqs: dict[tuple[str, str], int] = {}
    result = []
    ends = [(source, "ended", 0, b"") for source in sorted({choice[0] for choice in choices})]
    for source, kind, gap, extra in [*choices, *ends]:
        group = (source, "instances" if kind == "instances" else "event")
        seq = seqs[group] = seqs.get(group, -1) + 1 + gap
        common: dict[str, Any] = {"publisher": "ab" * 8, "seq": seq, "publish_ns": 10**18 + seq}
        if kind == "instances":
            header = InstancesHeader(
                **common,
                index=seq,
                capture_ns=10**18,
                width=64,
                height=48,
                count=gap,
                masks="crop_u8",
            )
            parts = encode(InstancesMessage(source, header, seen(gap), extra))
            parts.append(extra)  # a part of a later version
        else:
            data = {"names": ["background"], "id": "x"} if kind == "labels" else {"extra": extra}
            sent = seqs.get((source, "instances"), -1) + 1
            event = EventHeader(**common, event=kind, sent=sent, data=data)
            parts = encode(EventMessage(source, event))
        result.append(parts)
    return result
