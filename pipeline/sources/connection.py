"""Connection: one connection to a network stream or camera, read on its own thread."""

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
"""FFmpeg times out on a silent camera this much later than ``LiveSource``. When FFmpeg times out,
it first returns the frame that its parser held back, as if the camera delivered again."""


class Connection(threading.Thread):
    """Opens a source once and reads it into an inbox until it ends, fails or is abandoned.

    A read that hangs inside FFmpeg or in a name lookup cannot be interrupted from Python. The
    owner therefore waits on the inbox and abandons a connection that hangs. The thread closes the
    source as soon as the hanging call returns.

    Attributes:
        inbox: the frames, of which at most one waits; closed after the last one.
        source: the open source, set before its first frame is in the inbox; None until then.
        error: why reading failed; None at the end of the stream and after ``abandon``. Set before
            the inbox is closed.
        began_s: when the connection was made, ``time.monotonic`` seconds.
        last_packet_s: when the last packet arrived, ``time.monotonic`` seconds; None before the
            first.

    Args:
        config: the source.
        probe: check first whether the host accepts TCP connections. Without this check, a host
            that is off takes the whole timeout, because TCP retries at growing intervals.
    """

    def __init__(self, config: SourceConfig, *, probe: bool = False) -> None:
        super().__init__(name=f"read {config.name or redact(config.url)}", daemon=True)
        self.inbox: Inbox[Frame] = Inbox()
        self.source: VideoSource | None = None
        self.error: BaseException | None = None
        self.began_s = time.monotonic()
        self.last_packet_s: float | None = None
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
            with VideoSource(config, self._abandoned, self._on_packet) as source:
                self.source = source
                for frame in source:
                    if not self.inbox.put(frame):
                        return
        except BaseException as error:
            self.error = error
            if self._abandoned.is_set():
                self.error = None  # ``abandon`` may have run before the error was set
        finally:
            self.inbox.close()
            if self.source is not None:  # otherwise there was no decoder
                give_back_memory()

    def abandon(self) -> None:
        """Stop taking frames. The thread ends as soon as its current call returns.

        The error is released now. Its traceback refers to this connection, the source and the last
        frame: a reference cycle with a frame or two in it, which Python would collect only after
        hundreds of reconnects.
        """
        self._abandoned.set()
        self.error = None
        self.inbox.close(discard=True)

    def _on_packet(self) -> None:
        self.last_packet_s = time.monotonic()
