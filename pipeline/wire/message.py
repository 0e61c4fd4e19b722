"""Messages and their ZeroMQ parts, as specified in docs/wire.md. Uses no socket.

``decode`` accepts everything that ``encode`` returns, and raises only ``WireError`` for anything
else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.wire.masks import MaskFormat, WireError, decode_masks, encode_masks

__all__ = [
    "EventHeader",
    "EventMessage",
    "InstancesHeader",
    "InstancesMessage",
    "MaskFormat",
    "Message",
    "WireError",
    "array_names",
    "check_source_name",
    "decode",
    "decode_body",
    "decode_header",
    "encode",
    "labels_id",
    "topic",
]

VERSION = "v1"
ALL_EVENTS = f"{VERSION}/*/event".encode()
"""Subscription of a gateway to the events of every source. No topic begins with this prefix."""

MAX_SIDE = 16384
"""Maximum width and height of a frame, pixels."""

MAX_HEADER_BYTES = 1 << 20
"""Maximum length of part 1; decoded, it takes many times as much memory."""

TRACK_IDS = "track_ids"
"""In ``InstancesHeader.arrays``: track id of each instance, ``[N]`` int32, in part 2."""

KEYPOINTS = "keypoints"
"""In ``InstancesHeader.arrays``: keypoints of each instance, ``[N, K, 3]`` float32, in part 5."""

Kind = Literal["instances", "event"]
Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Hex16 = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
ShortText = Annotated[str, Meta(max_length=64)]

_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class InstancesHeader(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Part 1 of an ``instances`` message.

    Attributes:
        publisher: 16 hexadecimal digits, new at each start of the publisher.
        seq: number of this publisher's ``instances`` message of this source, from 0.
        index: index of the frame in its source, from 0, including dropped frames.
        capture_ns: when the frame was captured, UTC nanoseconds.
        publish_ns: when the message was sent, UTC nanoseconds.
        width: width of the frame, pixels; boxes and masks refer to this size.
        height: height of the frame, pixels.
        count: number of instances.
        masks: the format of part 3.
        labels: id of the table of label names, ``labels_id``; empty if there is none.
        pts_s: presentation time on the stream's own clock, seconds; None if it has none.
        clock: the clock of ``capture_ns``: "receipt" (the host that received the frame) or "sender"
            (the camera).
        stage_ms: processing time of each stage, milliseconds.
        drops: frames of this source dropped since the start, by stage and reason.
        dropped_before: frames of this source dropped since the previous message.
        arrays: the arrays after the labels in part 2, in order: "track_ids"; and "keypoints", which
            are in part 5.
        keypoints: names and skeleton of the keypoints; None without keypoints.
        zones: number of tracks in each zone, by the zone's name.
        lines: number of crossings of each line since the start, by the line's name and direction,
            "forward" or "backward".
        traceparent: the frame's span, W3C Trace Context; empty if the frame is not traced.
    """

    publisher: Hex16
    seq: Whole
    index: Whole
    capture_ns: Whole
    publish_ns: Whole
    width: Side
    height: Side
    count: Whole
    masks: MaskFormat
    labels: ShortText = ""
    pts_s: float | None = None
    clock: ShortText = "receipt"
    stage_ms: dict[str, float] = {}
    drops: dict[str, dict[str, Whole]] = {}
    arrays: Annotated[tuple[ShortText, ...], Meta(max_length=64)] = ()
    dropped_before: Whole = 0
    zones: dict[ShortText, Whole] = {}
    lines: dict[ShortText, dict[ShortText, Whole]] = {}
    keypoints: Keypoints | None = None
    traceparent: ShortText = ""


class EventHeader(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Part 1 of an ``event`` message.

    Attributes:
        publisher: 16 hexadecimal digits, new at each start of the publisher.
        seq: number of this publisher's event of this source, from 0. An event that is sent again to
            a new subscriber keeps its number.
        publish_ns: when it happened, UTC nanoseconds.
        event: the event's name; docs/wire.md lists them.
        sent: number of ``instances`` messages of this source sent before it.
        data: the event's data.
    """

    publisher: Hex16
    seq: Whole
    publish_ns: Whole
    event: ShortText
    sent: Whole = 0
    data: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class InstancesMessage:
    """The instances of one frame. ``jpeg`` is the image; None if it is not sent."""

    source: str
    header: InstancesHeader
    instances: Instances
    jpeg: bytes | None = None


@dataclass(frozen=True, slots=True)
class EventMessage:
    """An event of a source."""

    source: str
    header: EventHeader


Header = InstancesHeader | EventHeader
Message = InstancesMessage | EventMessage

_encoder = msgspec.msgpack.Encoder()
_header_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "instances": msgspec.msgpack.Decoder(InstancesHeader),
    "event": msgspec.msgpack.Decoder(EventHeader),
}


def check_source_name(name: str) -> str:
    """Return the name of a source if it is valid in a topic.

    Raises:
        InputError: it is not 1 to 64 of ``A-Z a-z 0-9 . _ -``, beginning with a letter or a digit.
    """
    if not _SOURCE_NAME.fullmatch(name):
        raise InputError(
            f"invalid source name {name[:80]!r}: expected 1 to 64 letters, digits and . _ -, "
            "beginning with a letter or a digit"
        )
    return name


def topic(source: str, kind: Kind) -> bytes:
    """Return part 0 of a message; ``v1/<source>/`` subscribes to all messages of a source."""
    return f"{VERSION}/{source}/{kind}".encode()


def labels_id(names: Sequence[str]) -> str:
    """Return the id of a table of label names: 8 hex digits of the SHA-256 of its lines."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


def encode(message: Message) -> list[bytes]:
    """Return the parts of a message. Boxes are clipped to the frame.

    The masks are encoded in the format given by the header. The header's ``count``, ``width``,
    ``height``, ``arrays`` and ``keypoints`` must match the instances.

    Raises:
        WireError: ``decode`` would reject the message.
    """
    if isinstance(message, EventMessage):
        parts = [topic(message.source, "event"), _encoder.encode(message.header)]
        decode_header(parts)
        return parts
    header, instances = message.header, message.instances
    if (header.count, header.width, header.height) != (
        len(instances),
        instances.width,
        instances.height,
    ):
        raise WireError("the header's count, width and height do not match the instances")
    is_posed = instances.keypoints is not None
    if header.arrays != array_names(instances) or is_posed != (header.keypoints is not None):
        raise WireError("the header's arrays and keypoints do not match the instances")
    # Encoded as a dict, whose length takes one byte: for a struct with more than 15 fields, msgspec
    # uses more.
    packed = _encoder.encode(msgspec.to_builtins(header))
    head = [topic(message.source, "instances"), packed]
    decode_header(head)
    limit = np.array([instances.width, instances.height] * 2, dtype="<f4")
    boxes = np.minimum(np.maximum(instances.boxes.astype("<f4"), 0), limit)
    scores, labels = instances.scores.astype("<f4"), instances.labels.astype("<i4")
    _check_arrays(boxes, scores, labels, header)
    arrays = [boxes, scores, labels]
    if instances.track_ids is not None:
        _check_track_ids(instances.track_ids)
        arrays.append(instances.track_ids.astype("<i4"))
    parts = [
        *head,
        b"".join(array.tobytes() for array in arrays),
        encode_masks(instances, header.masks),
    ]
    if instances.masks is not None and not isinstance(instances.masks, np.ndarray):
        decode_masks(parts[3], header.masks, header.count, header.width, header.height)
    if instances.keypoints is not None:
        keypoints = instances.keypoints.astype("<f4")
        _check_keypoints(keypoints, header)
        return [*parts, message.jpeg or b"", keypoints.tobytes()]
    return parts if message.jpeg is None else [*parts, message.jpeg]


def array_names(instances: Instances) -> tuple[str, ...]:
    """Return ``InstancesHeader.arrays``: the arrays besides boxes, scores and labels."""
    arrays = {TRACK_IDS: instances.track_ids, KEYPOINTS: instances.keypoints}
    return tuple(name for name, array in arrays.items() if array is not None)


def decode_header(parts: Sequence[bytes]) -> tuple[str, Header]:
    """Decode only the source and the header of a message.

    Raises:
        WireError: part 0 or 1 is malformed.
    """
    if len(parts) < 2:
        raise WireError(f"a message has 2 parts or more, not {len(parts)}")
    try:
        version, source, kind = bytes(parts[0][:128]).decode("ascii").split("/")
    except ValueError as error:
        raise WireError("the topic is not v1/<source>/<kind>") from error
    if version != VERSION or kind not in _header_decoders or not _SOURCE_NAME.fullmatch(source):
        raise WireError("the topic is not v1/<source>/<kind>")
    if len(parts[1]) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(parts[1])} bytes is longer than {MAX_HEADER_BYTES}")
    try:
        header: Header = _header_decoders[kind].decode(parts[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the header is malformed: {error}") from error
    return source, header


def decode(parts: Sequence[bytes]) -> Message:
    """Decode a message. Its arrays are read-only views of the parts.

    Raises:
        WireError: it is malformed.
    """
    source, header = decode_header(parts)
    if isinstance(header, EventHeader):
        return EventMessage(source, header)
    return decode_body(source, header, parts)


def decode_body(source: str, header: InstancesHeader, parts: Sequence[bytes]) -> InstancesMessage:
    """Decode the rest of an ``instances`` message whose header is already decoded.

    Args:
        source: as returned by ``decode_header``.
        header: as returned by ``decode_header``.
        parts: all parts of the message; the arrays are read-only views of them.

    Raises:
        WireError: it is malformed.
    """
    if len(parts) < 4:
        raise WireError(f"an instances message has 4 parts or more, not {len(parts)}")
    count = header.count
    # It may be longer: later versions may add arrays.
    if len(parts[2]) < 24 * count:
        raise WireError(f"{len(parts[2])} bytes of arrays for {count} instances")
    boxes = np.frombuffer(parts[2], dtype="<f4", count=4 * count).reshape(count, 4)
    scores = np.frombuffer(parts[2], dtype="<f4", count=count, offset=16 * count)
    labels = np.frombuffer(parts[2], dtype="<i4", count=count, offset=20 * count)
    _check_arrays(boxes, scores, labels, header)
    # The lengths of arrays are not sent, so only those before the first unknown one can be found.
    track_ids = None
    if header.arrays[:1] == (TRACK_IDS,):
        if len(parts[2]) < 28 * count:
            raise WireError(f"{len(parts[2])} bytes of arrays for {count} instances and their ids")
        track_ids = np.frombuffer(parts[2], dtype="<i4", count=count, offset=24 * count)
        _check_track_ids(track_ids)
    masks = decode_masks(parts[3], header.masks, count, header.width, header.height)
    instances = Instances(
        header.width,
        header.height,
        boxes,
        scores,
        labels,
        masks,
        track_ids,
        _decode_keypoints(header, parts),
    )
    # Without an image, part 4 is empty if part 5 follows.
    jpeg = bytes(parts[4]) if len(parts) == 5 or (len(parts) > 5 and len(parts[4])) else None
    return InstancesMessage(source, header, instances, jpeg)


def _decode_keypoints(
    header: InstancesHeader, parts: Sequence[bytes]
) -> NDArray[np.float32] | None:
    """Decode part 5, ``[N, K, 3]`` float32; return None if the header names no keypoints.

    Raises:
        WireError: the part is malformed or missing.
    """
    if KEYPOINTS not in header.arrays:
        return None
    if header.keypoints is None or len(parts) < 6:
        raise WireError("the header names keypoints that the message does not have")
    size = 12 * header.count * len(header.keypoints)
    if len(parts[5]) != size:
        raise WireError(f"{len(parts[5])} bytes of keypoints instead of {size}")
    found = np.frombuffer(parts[5], dtype="<f4")
    keypoints: NDArray[np.float32] = found.reshape(header.count, len(header.keypoints), 3)
    _check_keypoints(keypoints, header)
    return keypoints


def _check_arrays(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int32],
    header: InstancesHeader,
) -> None:
    """Raise WireError unless boxes are inside the frame, scores in 0..1 and labels not negative.

    The comparisons are written so that NaN fails them.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    limit = np.array([header.width, header.height], dtype="<f4")
    if not ((low >= 0) & (low <= high) & (high <= limit)).all():
        raise WireError("a box is not inside the frame")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise WireError("a score is not between 0 and 1")
    if not (labels >= 0).all():
        raise WireError("a label is negative")


def _check_track_ids(track_ids: NDArray[np.int32]) -> None:
    """Raise WireError if an id is negative, or two instances have the same track."""
    known = [track_id for track_id in track_ids.tolist() if track_id]
    if min(known, default=1) < 0:
        raise WireError("a track id is negative")
    if len(set(known)) != len(known):
        raise WireError("two instances have the same track id")


def _check_keypoints(keypoints: NDArray[np.float32], header: InstancesHeader) -> None:
    """Raise WireError unless keypoints match the header and are in the frame, scores in 0..1."""
    names = 0 if header.keypoints is None else len(header.keypoints)
    if keypoints.shape[1:] != (names, 3):
        raise WireError("the header's keypoints do not match the instances")
    limit = np.array([header.width, header.height, 1], dtype="<f4")
    if not np.all((keypoints >= 0) & (keypoints <= limit)):
        raise WireError("a keypoint is not inside the frame, or its score is not between 0 and 1")
