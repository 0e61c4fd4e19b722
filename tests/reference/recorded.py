"""Frames and instances for the tests of recorders."""

from __future__ import annotations

import av
import numpy as np

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published

NAMES = ("background", "person", "dog")


def frame(
    index: int,
    *,
    size: tuple[int, int] = (64, 48),
    pts_s: float | None = None,
    grey: int = 60,
    rotation: int = 0,
    source: str = "cam",
) -> Frame:
    pixels = np.full((size[1], size[0], 3), grey, np.uint8)
    return Frame(
        source=source,
        index=index,
        pts_s=index / 25 if pts_s is None else pts_s,
        capture_ns=1_700_000_000_000_000_000 + index * 40_000_000,
        decoded=av.VideoFrame.from_ndarray(pixels, format="rgb24"),
        rotation=rotation,
    )


def instances(width: int = 64, height: int = 48) -> Instances:
    crops = np.zeros((2, 28, 28), np.uint8)
    crops[0, 4:24, 4:24] = 255
    crops[1, :, :14] = 200
    return Instances(
        width=width,
        height=height,
        boxes=np.array([[2.123456, 3, 30, 40], [20, 10, 60, 44]], np.float32),
        scores=np.array([0.987654, 0.5], np.float32),
        labels=np.array([1, 2], np.int32),
        masks=crops,
    )


def published(seq: int) -> Published:
    return Published(seq=seq, publish_ns=0, dropped_before=0)
