"""Replay: publishes the messages of recordings again, as they were sent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from maskcast.engines.errors import InputError
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.wire.message import decode_header
from maskcast.pipeline.wire.recording import check_recordings, read_recording
from maskcast.pipeline.wire.server_keys import ServerKeys

ANSWER_S = 0.05
"""Interval at which new subscribers are answered while nothing is sent, seconds."""


def replay(
    recordings: str | Path | Sequence[str | Path],
    publish: str,
    *,
    speed: float | Literal["max"] = 1.0,
    loop: bool = False,
    wait_subscribers: int = 1,
    secret_key: str | Path | None = None,
    allowed_clients: str | Path | None = None,
) -> int:
    """Publish recordings again, with the messages, numbers and intervals that they had.

    A subscriber that has received the same messages before counts them as duplicates.

    Args:
        recordings: one or several ``.mcap`` files, sent one after the other.
        publish: endpoint to bind, "tcp://127.0.0.1:5555".
        speed: 2 halves the intervals; "max" sends as fast as the slowest subscriber receives.
        loop: repeat after the last message. Each round has a new publisher id, as after a restart.
        wait_subscribers: wait for this many subscribers of each source before the first message.
        secret_key: your ``.key_secret`` file, to encrypt.
        allowed_clients: folder of ``.key`` files that may subscribe.

    Returns:
        The number of messages sent.

    Raises:
        InputError: a file cannot be read, or the endpoint cannot be bound.
    """
    given = [recordings] if isinstance(recordings, (str, Path)) else list(recordings)
    paths = check_recordings([f"file:{path}" for path in given])
    if speed != "max" and not speed > 0:
        raise InputError(f"speed {speed}: use a number above 0, or max")
    keys = None
    if secret_key is not None and allowed_clients is not None:
        keys = ServerKeys.read(secret_key, allowed_clients)
    elif secret_key is not None or allowed_clients is not None:
        raise InputError("keys go together: give the secret key and the allowed clients")
    names = sorted({source for path in paths for source in _sources(path)})
    if not names:
        raise InputError(f"{paths[0]}: contains no messages; use another recording")
    sent, publisher_ids = 0, dict[str, str]()
    with Publisher(publish, (), keys=keys, lossless=speed == "max") as publisher:
        while not publisher.wait_for_subscribers(wait_subscribers, 1.0, names):
            pass
        while True:
            for path in paths:
                sent += _send(path, publisher, speed, publisher_ids)
            if not loop:
                return sent
            publisher_ids = _NewIds()


def _send(
    path: Path, publisher: Publisher, speed: float | Literal["max"], publisher_ids: dict[str, str]
) -> int:
    first_ns: int | None = None
    began_s, sent = time.monotonic(), 0
    for parts, received_ns in read_recording(path):
        first_ns = received_ns if first_ns is None else first_ns
        if speed != "max":
            due_s = began_s + (received_ns - first_ns) / 1e9 / speed
            while (left_s := due_s - time.monotonic()) > 0:
                publisher.answer_subscriptions()
                time.sleep(min(left_s, ANSWER_S))
        publisher.relay(_renamed(parts, publisher_ids))
        sent += 1
    return sent


class _NewIds(dict[str, str]):
    """A new publisher id for each old one."""

    def __missing__(self, old: str) -> str:
        self[old] = os.urandom(8).hex()
        return self[old]


def _renamed(parts: list[bytes], publisher_ids: dict[str, str]) -> list[bytes]:
    """Return a message with its new publisher id; unchanged in the first round."""
    if not isinstance(publisher_ids, _NewIds):
        return parts
    header = msgspec.msgpack.decode(parts[1])
    header["publisher"] = publisher_ids[header["publisher"]]
    return [parts[0], msgspec.msgpack.encode(header), *parts[2:]]


def _sources(path: Path) -> set[str]:
    """Return the names of a recording's sources. Reads the whole file, which also checks it."""
    return {decode_header(parts)[0] for parts, _ in read_recording(path)}
