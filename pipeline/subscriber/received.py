"""PublishedFrame and StreamEvent: what a subscription yields."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.wire.message import InstancesMessage, WireError


@dataclass(frozen=True, slots=True, eq=False)
class PublishedFrame:
    """One frame as received from a publisher.

    Attributes:
        source: the source's name.
        publisher: 16 hexadecimal digits, new at each start of the publisher.
        seq: sequence number of the message, per publisher and source, from 0.
        index: index of the frame in its source, from 0, including dropped frames.
        pts_s: presentation time on the stream's own clock, seconds; None if the stream has none.
        capture_ns: when the frame was captured, UTC nanoseconds.
        publish_ns: when the message was sent, UTC nanoseconds.
        received_ns: when it arrived here, UTC nanoseconds.
        age_ms: time from capture until the frame was returned to you; in a recording, until it was
            recorded. Between machines, it is only as accurate as their clocks.
        lost_before: messages of this source that were lost since the previous frame.
        skipped_before: messages replaced by newer ones since the previous frame (policy "latest").
        restarted: whether the publisher was restarted since the previous frame, so that ``seq``
            began again at 0.
        clock: the clock of ``capture_ns``: "receipt" (the publisher's host) or "sender" (camera).
        stage_ms: processing time of each stage, milliseconds.
        drops: frames of this source that the publisher has dropped so far, by stage and reason.
        dropped_before: frames of this source that the publisher dropped since its previous message;
            unlike ``lost_before``, these were never sent.
        zones: number of tracks in each zone, by the zone's name; empty if there are no zones.
        lines: number of crossings of each line since the start, by the line's name and direction,
            "forward" or "backward".
        instances: boxes, scores, labels and masks, and track ids and keypoints if there are any.
        label_names: class names, indexed by label; empty until the table has arrived.
        keypoints: names and skeleton of ``instances.keypoints``; None if no poses are estimated.
        jpeg: the image as JPEG, if the publisher sends it.
        traceparent: the frame's span, W3C Trace Context, to continue its trace; empty if the frame
            is not traced.
    """

    source: str
    publisher: str
    seq: int
    index: int
    pts_s: float | None
    capture_ns: int
    publish_ns: int
    received_ns: int
    age_ms: float
    lost_before: int
    skipped_before: int
    restarted: bool
    clock: str
    stage_ms: dict[str, float]
    drops: dict[str, dict[str, int]]
    dropped_before: int
    zones: dict[str, int]
    lines: dict[str, dict[str, int]]
    instances: Instances
    label_names: tuple[str, ...]
    keypoints: Keypoints | None
    jpeg: bytes | None
    traceparent: str = ""

    @classmethod
    def from_message(
        cls,
        message: InstancesMessage,
        *,
        received_ns: int,
        lost_before: int,
        skipped_before: int,
        restarted: bool,
        label_names: tuple[str, ...],
        recorded: bool = False,
    ) -> Self:
        """Create a frame from a decoded message.

        ``age_ms`` ends now, or with ``recorded`` at ``received_ns``; the other arguments are the
        attributes of the same names.
        """
        header = message.header
        return cls(
            source=message.source,
            publisher=header.publisher,
            seq=header.seq,
            index=header.index,
            pts_s=header.pts_s,
            capture_ns=header.capture_ns,
            publish_ns=header.publish_ns,
            received_ns=received_ns,
            age_ms=((received_ns if recorded else time.time_ns()) - header.capture_ns) / 1e6,
            lost_before=lost_before,
            skipped_before=skipped_before,
            restarted=restarted,
            clock=header.clock,
            stage_ms=header.stage_ms,
            drops=header.drops,
            dropped_before=header.dropped_before,
            zones=header.zones,
            lines=header.lines,
            instances=message.instances,
            label_names=label_names,
            keypoints=header.keypoints,
            jpeg=message.jpeg,
            traceparent=header.traceparent,
        )

    def image(self) -> NDArray[np.uint8] | None:
        """Decode the image: RGB, uint8 ``[height, width, 3]``; None if the message has none.

        Raises:
            WireError: part 4 is not a JPEG file.
        """
        if not self.jpeg:  # without an image, part 4 is empty if part 5 follows
            return None
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.jpeg), formats=("JPEG",)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise WireError(f"the image is malformed: {error}") from error


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event of a source: "state", "size", "labels", "ended" and others.

    Attributes:
        source: the source's name.
        publisher: identifies one start of the publisher.
        name: the event's name; docs/wire.md lists them.
        data: the event's data.
        publish_ns: when it happened, UTC nanoseconds.
        received_ns: when it arrived here, UTC nanoseconds.
    """

    source: str
    publisher: str
    name: str
    data: dict[str, Any]
    publish_ns: int
    received_ns: int
