"""Connection: one opening of a network stream or camera, read on a thread of its own."""

from __future__ import annotations

import threading
import time

import msgspec

from maskcast.engines.memory import give_back_memory
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.sources.errors import probe_tcp
from maskcast.pipeline.sources.video import VideoSource
from maskcast.pipeline.url import redact, scheme

READ_GRACE_S = 1.0
"""FFmpeg times out on a silent camera this much later than ``LiveSource``. On its timeout it first
returns the frame that its parser holds back, which would look as if the camera were back."""


class Connection(threading.Thread):
    """Opens a source once and reads it into an inbox until it ends, breaks or is abandoned.

    A read that hangs inside FFmpeg or in the name service cannot be interrupted from Python. The
    reader therefore waits on the inbox and abandons a connection that hangs, which closes what it
    has opened as soon as the call returns.

    Attributes:
        inbox: the frames, of which at most one waits; closed after the last one.
        source: the open source, set before its first frame is in the inbox; None until then.
        error: why it ended; None for the end of the stream, and once it is abandoned. Set before
            the inbox is closed.
        began_s, heard_s: when it began, and when the last packet arrived, of ``time.monotonic``;
            ``heard_s`` is None before the first.

    Args:
        config: the source.
        probe: check first whether the host answers at all. A host that is off would take the whole
            timeout, and TCP repeats its requests at growing intervals.
    """

    def __init__(self, config: SourceConfig, *, probe: bool = False) -> None:
        super().__init__(name=f"read {config.name or redact(config.url)}", daemon=True)
        self.inbox: Inbox[Frame] = Inbox()
        self.source: VideoSource | None = None
        self.error: BaseException | None = None
        self.began_s = time.monotonic()
        self.heard_s: float | None = None
        self._config = config
        self._probe = probe
        self._abandoned = threading.Event()
        mark_abandonable(self)

    def run(self) -> None:
        """Read to the end."""
        try:
            if self._probe:
                probe_tcp(self._config.url)
            config = self._config
            if not scheme(config.url).startswith("http"):
                timeout_s = config.read_timeout_s + READ_GRACE_S
                config = msgspec.structs.replace(config, read_timeout_s=timeout_s)
            with VideoSource(config, self._abandoned, self._hear) as source:
                self.source = source
                for frame in source:
                    if not self.inbox.put(frame):
                        return
        except BaseException as error:
            self.error = error
            if self._abandoned.is_set():
                self.error = None  # see ``abandon``, which may have looked too early
        finally:
            self.inbox.close()
            if self.source is not None:  # else there was no decoder
                give_back_memory()

    def abandon(self) -> None:
        """Take nothing more from it; it ends by itself, as soon as it can.

        The error is released now. Its traceback refers to this connection, its source and the last
        frame: a cycle, which Python would collect only after hundreds of reconnects, with a frame
        or two in each.
        """
        self._abandoned.set()
        self.error = None
        self.inbox.close(discard=True)

    def _hear(self) -> None:
        self.heard_s = time.monotonic()
