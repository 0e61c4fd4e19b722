"""PatternSource: a moving test pattern."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from itertools import count

import av
import numpy as np
from numpy.typing import NDArray

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame, Timeline
from maskcast.pipeline.sources.source import Pace, Source


class PatternSource(Source):
    """``test://WIDTHxHEIGHT@FPS``: endless moving colour gradients and a white square.

    Frame ``index`` is the same on every machine. The frames arrive at their rate, like a camera's;
    with the policy ``block`` they arrive as fast as they are taken.
    """

    def __init__(self, config: SourceConfig, stopping: threading.Event | None = None) -> None:
        super().__init__(config, stopping)
        self.live = config.policy != "block"

    def open(self) -> None:
        """Read the size and the frame rate from the URL.

        Raises:
            InputError: the URL does not have this form.
        """
        self.width, self.height, self.fps = pattern_format(self._config.url)

    def __iter__(self) -> Iterator[Frame]:
        assert self.fps is not None
        pace = Pace(self._stopping)
        for index in count():
            if self.live:
                pace.wait(index / self.fps)
            if self._stopping.is_set():
                return
            timeline = Timeline()
            timeline.begin("decode")
            capture_ns = time.time_ns()
            decoded = av.VideoFrame.from_ndarray(
                draw_pattern(self.width, self.height, index), "rgb24"
            )
            timeline.end("decode")
            yield Frame(self.name, index, index / self.fps, capture_ns, decoded, timeline=timeline)

    def close(self) -> None:
        """Do nothing: a pattern holds no resources."""


def pattern_format(url: str) -> tuple[int, int, float]:
    """Return the width and height in pixels and the frames per second of a pattern's URL.

    Raises:
        InputError: the URL does not have this form.
    """
    form = re.fullmatch(r"test://([1-9]\d{0,3})x([1-9]\d{0,3})@(\d{1,3}(?:\.\d+)?)", url, re.I)
    if form is None or float(form[3]) == 0:
        raise InputError(
            f"{url}: not a test pattern; write test://WIDTHxHEIGHT@FPS, like test://1280x720@30"
        )
    return int(form[1]), int(form[2]), float(form[3])


def draw_pattern(width: int, height: int, index: int) -> NDArray[np.uint8]:
    """Draw frame ``index`` of the test pattern: ``[height, width, 3]`` uint8 RGB."""
    pattern = np.empty((height, width, 3), np.uint8)
    pattern[..., 0] = (np.arange(width) + 3 * index).astype(np.uint8)
    pattern[..., 1] = (np.arange(height) + index).astype(np.uint8)[:, None]
    pattern[..., 2] = (5 * index) % 256
    side = max(1, min(width, height) // 8)
    x, y = (7 * index) % max(1, width - side), (4 * index) % max(1, height - side)
    pattern[y : y + side, x : x + side] = 255
    return pattern
