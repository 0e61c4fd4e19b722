"""Packet: one frame as the page receives it, in a binary websocket message.

========  ==========================================================
bytes     what
========  ==========================================================
8         float64: the frame's age when the packet is sent, in ms
4         uint32 H: length of the header, a multiple of 4
4         uint32 M: length of the masks
H         header, JSON, padded with spaces
24 N      boxes float32 [N][4], scores float32 [N], labels int32 [N]
4 N       track ids int32 [N], if ``ids`` is set in the header
12 N K    keypoints float32 [N][K][3], if ``points`` (K) is not 0
M         masks: crops or polygons, as in part 3 of docs/wire.md
the rest  the image, JPEG
========  ==========================================================

Numbers are little-endian. The header does not contain the source's URL.
"""

from __future__ import annotations

import struct
import time
from functools import cached_property

import msgspec
import numpy as np

from maskcast.pipeline.subscriber.received import PublishedFrame
from maskcast.pipeline.wire.masks import encode_masks


class PacketHeader(msgspec.Struct, frozen=True):
    """The header of a packet.

    Attributes:
        source: the source's name.
        publisher: id of the publisher, a new one at each start.
        seq: number of the message at this publisher and source.
        publish_ms: when the message was sent, UTC milliseconds.
        latency_ms: time from capture to publication, milliseconds.
        width: width of the frame, pixels.
        height: height of the frame, pixels.
        count: number of instances.
        ids: whether there are track ids.
        points: number of keypoints of each instance; 0 if no pose is estimated.
        skeleton: pairs of keypoints that are drawn as lines.
        masks: "crops", "polygons" or "none".
        names: label names by label, of the labels in this frame.
        zones: instances in each zone.
        lines: crossings of each line, by direction.
        dropped: number of frames of this source that the publisher has dropped.
        lost: number of messages of this source that did not arrive at the view.
    """

    source: str
    publisher: str
    seq: int
    publish_ms: float
    latency_ms: float
    width: int
    height: int
    count: int
    ids: bool
    points: int
    skeleton: tuple[tuple[int, int], ...]
    masks: str
    names: dict[str, str]
    zones: dict[str, int]
    lines: dict[str, dict[str, int]]
    dropped: int
    lost: int


class Packet:
    """A frame to send to browsers; encoded once, when it is first sent.

    Args:
        frame: the frame.
        lost: number of messages of its source that have not arrived so far.
    """

    def __init__(self, frame: PublishedFrame, lost: int) -> None:
        self._frame = frame
        self._lost = lost

    @property
    def source(self) -> str:
        """The source's name."""
        return self._frame.source

    def encode(self) -> bytes:
        """Return the packet's bytes, with the frame's current age."""
        age_ms = (time.time_ns() - self._frame.capture_ns) / 1e6
        return struct.pack("<d", age_ms) + self._body

    @cached_property
    def _body(self) -> bytes:
        frame, instances = self._frame, self._frame.instances
        if instances.masks is None:
            mask_format, masks = "none", b""
        elif isinstance(instances.masks, np.ndarray):
            mask_format, masks = "crops", instances.masks.tobytes()
        else:
            mask_format, masks = "polygons", encode_masks(instances, "polygon")
        names = {
            str(label): frame.label_names[label]
            for label in set(instances.labels.tolist())
            if label < len(frame.label_names)
        }
        header = msgspec.json.encode(
            PacketHeader(
                source=frame.source,
                publisher=frame.publisher,
                seq=frame.seq,
                publish_ms=frame.publish_ns / 1e6,
                latency_ms=(frame.publish_ns - frame.capture_ns) / 1e6,
                width=instances.width,
                height=instances.height,
                count=len(instances),
                ids=instances.track_ids is not None,
                points=0 if instances.keypoints is None else instances.keypoints.shape[1],
                skeleton=() if frame.keypoints is None else frame.keypoints.skeleton,
                masks=mask_format,
                names=names,
                zones=frame.zones,
                lines=frame.lines,
                dropped=sum(sum(reasons.values()) for reasons in frame.drops.values()),
                lost=self._lost,
            )
        )
        header += b" " * (-len(header) % 4)
        parts = [
            struct.pack("<II", len(header), len(masks)),
            header,
            instances.boxes.astype("<f4").tobytes(),
            instances.scores.astype("<f4").tobytes(),
            instances.labels.astype("<i4").tobytes(),
        ]
        if instances.track_ids is not None:
            parts.append(instances.track_ids.astype("<i4").tobytes())
        if instances.keypoints is not None:
            parts.append(instances.keypoints.astype("<f4").tobytes())
        return b"".join([*parts, masks, frame.jpeg or b""])
