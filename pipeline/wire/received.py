"""PublishedFrame and StreamEvent: what a subscriber is handed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances import Instances
from maskcast.pipeline.wire.message import WireError


@dataclass(frozen=True, slots=True, eq=False)
class PublishedFrame:
    """What was seen in one frame, as it came over the wire.

    Attributes:
        source: the source's name.
        publisher: identifies one start of the publisher.
        seq: number of this message among the publisher's of this source, from 0.
        index: which picture of the source this is, from 0, those never processed included.
        pts_s: presentation time in the stream's own clock, seconds; None where it has none.
        capture_ns: when the picture was captured, UTC nanoseconds.
        publish_ns: when the message was sent, UTC nanoseconds.
        received_ns: when it arrived here, UTC nanoseconds.
        age_ms: time from capture until it was handed to you. Across machines it is only as good as
            their clocks agree.
        lost_before: messages of this source, since the one handed to you before, that never
            arrived.
        skipped_before: likewise, that arrived and gave way to a newer one (policy "latest").
        restarted: the publisher was started anew since the frame before; ``seq`` began again.
        clock: whose time ``capture_ns`` is: "receipt" (the publisher's host) or "sender" (camera).
        stage_ms: time that each stage worked on the picture, milliseconds.
        drops: pictures of this source dropped by the publisher so far, by stage, by reason.
        zones: instances in each zone, by the zone's name; empty where there are none.
        lines: instances that have crossed each line since the start, by the line's name, then by
            direction: "forward" and "backward".
        instances: what was seen.
        label_names: ``label_names[instances.labels[i]]``; empty while the table is not known.
        jpeg: the picture, where the publisher sends it.
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
    zones: dict[str, int]
    lines: dict[str, dict[str, int]]
    instances: Instances
    label_names: tuple[str, ...]
    jpeg: bytes | None

    def picture(self) -> NDArray[np.uint8] | None:
        """Decode the picture: ``[h, w, 3]`` uint8 RGB; None where the publisher sends none.

        Raises:
            WireError: it is no JPEG.
        """
        if self.jpeg is None:
            return None
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.jpeg), formats=("JPEG",)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise WireError(f"the picture is malformed: {error}") from error


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Something that happened to a source: "state", "size", "labels", "ended", ...

    Attributes:
        source: the source's name.
        publisher: identifies one start of the publisher.
        name: which event; docs/wire.md lists them.
        data: what belongs to it.
        publish_ns: when it happened, UTC nanoseconds.
        received_ns: when it arrived here, UTC nanoseconds.
    """

    source: str
    publisher: str
    name: str
    data: dict[str, Any]
    publish_ns: int
    received_ns: int
