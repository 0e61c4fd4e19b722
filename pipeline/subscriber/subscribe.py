"""The ``subscribe`` function: connects to publishers, or reads recordings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from maskcast.engines.errors import InputError
from maskcast.pipeline.subscriber.backlog import Policy
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.receiver import read_client_keys
from maskcast.pipeline.subscriber.subscription import Subscription
from maskcast.pipeline.wire.endpoint import check_endpoint
from maskcast.pipeline.wire.message import check_source_name
from maskcast.pipeline.wire.recording import check_recordings


@overload
def subscribe(
    endpoints: str | Sequence[str],
    sources: str | Sequence[str] | None = ...,
    *,
    policy: Policy = ...,
    timeout_s: float = ...,
    events: Literal[False] = ...,
    until_ended: bool = ...,
    high_water_mark: int = ...,
    max_message_bytes: int = ...,
    server_key: str | Path | None = ...,
    client_key: str | Path | None = ...,
) -> Subscription[PublishedFrame]: ...


@overload
def subscribe(
    endpoints: str | Sequence[str],
    sources: str | Sequence[str] | None = ...,
    *,
    policy: Policy = ...,
    timeout_s: float = ...,
    events: Literal[True],
    until_ended: bool = ...,
    high_water_mark: int = ...,
    max_message_bytes: int = ...,
    server_key: str | Path | None = ...,
    client_key: str | Path | None = ...,
) -> Subscription[PublishedFrame | StreamEvent]: ...


@overload
def subscribe(
    endpoints: str | Sequence[str],
    sources: str | Sequence[str] | None = ...,
    *,
    policy: Policy = ...,
    timeout_s: float = ...,
    events: bool,
    until_ended: bool = ...,
    high_water_mark: int = ...,
    max_message_bytes: int = ...,
    server_key: str | Path | None = ...,
    client_key: str | Path | None = ...,
) -> Subscription[Any]: ...


def subscribe(
    endpoints: str | Sequence[str],
    sources: str | Sequence[str] | None = None,
    *,
    policy: Policy = "latest",
    timeout_s: float = 5.0,
    events: bool = False,
    until_ended: bool = True,
    high_water_mark: int = 256,
    max_message_bytes: int = 64 << 20,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
) -> Subscription[Any]:
    """Subscribe to publishers.

    .. code-block:: python

        for frame in subscribe("tcp://camera-host:5555", sources="cam1"):
            print(frame.seq, frame.age_ms, frame.lost_before, len(frame.instances))

    A recording yields the same frames: ``subscribe("file:recording.mcap")``. It is read as fast as
    the loop consumes the frames, nothing is skipped, and the loop ends with the file.

    The loop ends when every source has ended (all named sources, or all sources known so far). It
    raises TimeoutError when nothing arrives for ``timeout_s``. ``async for`` works the same way.
    Inside ``with`` the connection stays open between loops; otherwise it is closed after the loop.

    If a publisher refuses the connection, it is retried with backoff until it succeeds. The reason
    is logged once (logger ``maskcast.pipeline.wire.reconnecting``).

    Args:
        endpoints: one or more of "tcp://host:5555" and "ipc:///run/maskcast.sock"; or one or more
            recordings, "file:recording.mcap", which are read one after another.
        sources: names of the sources; None for all.
        policy: "latest" returns the newest frame of each source and skips older ones, so that the
            age stays bounded; "all" returns every frame that arrives.
        timeout_s: seconds to wait for the next frame (or event) before TimeoutError.
        events: also return ``StreamEvent`` objects.
        until_ended: end when every source has ended; if False, wait for sources to come back.
        high_water_mark: maximum number of queued messages. With the policy "latest" the queue holds
            one message per source, so use at least the number of sources.
        max_message_bytes: longer messages are discarded and counted as malformed; a longer part
            also closes the connection, which is then reopened.
        server_key: the publisher's ``.key`` file, if it uses keys.
        client_key: your ``.key_secret`` file, as made by ``maskcast keys new``.

    Raises:
        InputError: an endpoint, a source name, the policy or a key is invalid.
    """
    endpoints = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    if isinstance(sources, str):
        sources = (sources,)
    if policy not in ("latest", "all"):
        raise InputError(f'invalid policy {policy!r}: expected "latest" or "all"')
    if sources is not None and not sources:
        raise InputError("sources: none given; name at least one, or use None for all")
    if not endpoints:
        raise InputError("endpoints: none given; give at least one, for example tcp://host:5555")
    keys = read_client_keys(server_key, client_key)
    recordings = check_recordings(endpoints)
    if not recordings:
        for endpoint in endpoints:
            check_endpoint(endpoint, "tcp://host:5555")
    return Subscription(
        endpoints,
        None if sources is None else tuple(check_source_name(name) for name in sources),
        policy=policy,
        timeout_s=timeout_s,
        events=events,
        until_ended=until_ended,
        high_water_mark=high_water_mark,
        max_message_bytes=max_message_bytes,
        keys=keys,
        recordings=recordings,
    )
