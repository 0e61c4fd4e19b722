"""Trails: the recent paths of the tracked objects of one source."""

from __future__ import annotations

from collections import deque

from PIL import Image, ImageDraw

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.outputs.draw import palette

MAX_POINTS = 256
"""Maximum number of points of a trail; the oldest are dropped."""

Point = tuple[float, float, float]
"""Time in seconds, then x and y in pixels."""


class Trails:
    """Draws the path of every tracked object, in the colour of its track.

    A path follows the middle of the box's lower edge, where an object touches the ground.

    Args:
        duration_s: duration of a trail, seconds.
    """

    def __init__(self, duration_s: float) -> None:
        self._duration_s = duration_s
        self._points: dict[int, deque[Point]] = {}

    def draw(self, image: Image.Image, instances: Instances, time_s: float) -> None:
        """Add the objects of one frame to their trails, and draw all trails in place.

        Args:
            image: an RGB image of the size of ``instances``.
            instances: the frame's instances; those without a track have no trail.
            time_s: the frame's time, seconds. A step back deletes all trails.
        """
        self._add(instances, time_s)
        width = max(1, round(min(image.size) / 240))
        pen = ImageDraw.Draw(image)
        for track_id, points in self._points.items():
            line = [(x, y) for _, x, y in points]
            if len(line) > 1:
                pen.line(line, fill=palette(track_id), width=width, joint="curve")

    def _add(self, instances: Instances, time_s: float) -> None:
        newest_s = max((points[-1][0] for points in self._points.values()), default=time_s)
        if time_s < newest_s:
            self._points.clear()
        if instances.track_ids is not None:
            for track_id, (x1, _, x2, y2) in zip(
                instances.track_ids.tolist(), instances.boxes.tolist(), strict=True
            ):
                if track_id:
                    points = self._points.setdefault(track_id, deque(maxlen=MAX_POINTS))
                    points.append((time_s, (x1 + x2) / 2, y2))
        for track_id, points in list(self._points.items()):
            while points and points[0][0] < time_s - self._duration_s:
                points.popleft()
            if not points:
                del self._points[track_id]
