"""Messages of the control socket: requests, and the reports in the answers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Policy, SourceConfig
from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import SourceStats
from maskcast.pipeline.url import redact, shorten

MAX_REQUEST_BYTES = 16 << 10
"""Maximum size of a request, bytes."""


class ListSources(msgspec.Struct, tag="list", tag_field="request", forbid_unknown_fields=True):
    """Ask for all sources with their states and figures."""


class AddSource(msgspec.Struct, tag="add", tag_field="request", forbid_unknown_fields=True):
    """Ask for one more source; ``source`` has the keys of the configuration's sources."""

    source: dict[str, Any]


class RemoveSource(msgspec.Struct, tag="remove", tag_field="request", forbid_unknown_fields=True):
    """Ask to remove a source."""

    name: Annotated[str, Meta(max_length=64)]


class MoveSource(msgspec.Struct, tag="move", tag_field="request", forbid_unknown_fields=True):
    """Ask a cluster to move a source to a node, given by its name or the start of its id."""

    name: Annotated[str, Meta(max_length=64)]
    node: Annotated[str, Meta(min_length=1, max_length=256)]


Request = ListSources | AddSource | RemoveSource | MoveSource


class Placement(StrEnum):
    """The placement of a source of a cluster; docs/cluster.md describes each value."""

    PLACING = "placing"
    UNPLACED = "unplaced"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    SET_ASIDE = "set aside"
    ENDED = "ended"
    REMOVING = "removing"


class SourceReport(msgspec.Struct, frozen=True):
    """A source's state and figures; docs/wire.md describes each key."""

    name: str
    url: str
    state: SourceState
    detail: str
    policy: Policy | None
    width: int | None
    height: int | None
    fps: float
    captured: int
    processed: int
    dropped: int
    reconnects: int
    skipped: int = 0
    node: str | None = None
    pid: int | None = None
    placement: Placement | None = None
    restarts: int | None = None

    @classmethod
    def unread(cls, config: SourceConfig) -> Self:
        """Make the report of a source from which nothing has been read yet."""
        return cls(
            name=config.name or "",
            url=redact(config.url),
            state=SourceState.CONNECTING,
            detail="",
            policy=config.policy,
            width=None,
            height=None,
            fps=0.0,
            captured=0,
            processed=0,
            dropped=0,
            reconnects=0,
        )


NOT_MOVED = "not moved: "
"""Prefix of a source's detail after a failed move."""


class NodeReport(msgspec.Struct, frozen=True):
    """A node of a cluster; docs/wire.md describes each key."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: float


class GatewayReport(msgspec.Struct, frozen=True):
    """The gateway of a cluster; docs/wire.md describes each key."""

    endpoint: str
    pid: int | None
    restarts: int
    publishers: int
    subscribers: int
    lost: int


class ClusterReport(msgspec.Struct, frozen=True):
    """The machines of a cluster."""

    nodes: list[NodeReport]
    gateway: GatewayReport


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a request: ``error`` is one line without credentials, "" on success."""

    ok: bool
    error: str = ""
    sources: list[SourceReport] | None = None
    cluster: ClusterReport | None = None


def decode_request(data: bytes) -> Request:
    """Read a request.

    Raises:
        InputError: it is too long, not a msgpack map, or an unknown request.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise InputError(f"a request has {MAX_REQUEST_BYTES} bytes at most, not {len(data)}")
    try:
        request: Request = msgspec.msgpack.decode(data, type=Request)
        return request
    except msgspec.ValidationError as error:
        raise InputError(f"not a request: {shorten(redact(str(error)))}") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise InputError("not a request: expected a msgpack map with the key 'request'") from None


def report_source(config: SourceConfig, stats: SourceStats) -> SourceReport:
    """Make the report of a source."""
    return SourceReport(
        name=stats.name,
        url=redact(config.url),
        state=stats.state,
        detail=shorten(stats.detail),
        policy=config.policy,
        width=stats.last.width if stats.last is not None else None,
        height=stats.last.height if stats.last is not None else None,
        fps=round(stats.fps, 2),
        captured=stats.captured,
        processed=stats.processed,
        dropped=sum(stats.dropped.values()),
        reconnects=stats.reconnects,
        skipped=sum(stats.skipped.values()),
    )
