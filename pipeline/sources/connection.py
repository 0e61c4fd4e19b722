"""Connection: one opening of a network stream or camera, read on a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from urllib.parse import urlsplit

import msgspec

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.memory import give_back_memory
from maskcast.pipeline.sources.video import VideoSource
from maskcast.pipeline.url import redact, scheme

KNOCK_TIMEOUT_S = 1.0
"""A camera's host answers a TCP connect within this, or is not there."""

READ_GRACE_S = 1.0
"""FFmpeg gives up a silent camera so much later than whoever waits for its pictures. When it does,
it first hands out the picture that its parser holds back, as if the camera were there again."""

_PORTS = {"rtsp": 554, "rtsps": 322}


class Connection(threading.Thread):
    """Opens a source once and reads it into an inbox until it ends, breaks or is abandoned.

    A read that hangs inside FFmpeg, or in the name service, cannot be interrupted from Python. So
    whoever waits for pictures waits at the inbox, and leaves a connection that hangs to itself: it
    closes what it has opened as soon as the call that hangs returns.

    Attributes:
        inbox: the pictures, at most one of which waits; closed behind the last one.
        source: the open source, from before its first picture is in the inbox; None until then.
        error: why it ended, None for the end of the stream and once it is abandoned; set before
            the inbox is closed.
        began_s, heard_s: when it began and when the last packet came, of ``time.monotonic``;
            ``heard_s`` is None before the first.

    Args:
        config: the source.
        probe: first see whether the host answers at all. One that is switched off would hold up an
            opening for all its timeout, and TCP asks again ever more rarely.
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

    def run(self) -> None:
        """Read to the end."""
        try:
            if self._probe:
                probe_tcp(self._config.url)
            config = self._config
            if scheme(config.url) in _PORTS:
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
        """Want nothing more from it; it ends by itself, as soon as it can.

        The error goes now. Through its traceback it holds this very connection, its source and the
        last picture: a cycle, and in a long run Python looks for those only after hundreds of
        reconnects, with a picture or two in each.
        """
        self._abandoned.set()
        self.error = None
        self.inbox.close(discard=True)

    def _hear(self) -> None:
        self.heard_s = time.monotonic()


def probe_tcp(url: str) -> None:
    """See whether the host of an RTSP address takes TCP connections. Others are not asked.

    Raises:
        InputError: it does not.
    """
    kind, shown = scheme(url), redact(url)
    if kind not in _PORTS:
        return
    try:
        address = urlsplit(shown)
        host, port = address.hostname or "", address.port or _PORTS[kind]
        socket.create_connection((host, port), KNOCK_TIMEOUT_S).close()
    except ConnectionRefusedError:
        raise InputError(
            f"{shown}: connection refused; check the address and that the server is running"
        ) from None
    except (OSError, ValueError) as error:
        reason = (
            f"no answer within {KNOCK_TIMEOUT_S:g} s"
            if isinstance(error, TimeoutError)
            else (getattr(error, "strerror", None) or "not an address")
        )
        raise InputError(f"{shown}: {reason}; check the address") from None
