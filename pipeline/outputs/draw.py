"""Drawing of instances: masks, outlines, boxes, skeletons, and labels with scores."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskcast.engines.instances.instances import VISIBLE, Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.engines.instances.masks import Patch

FILL = 0.42
"""Opacity of a mask, 0..1."""
TAG_TRIES = 6
"""Number of places below a box's upper edge that are tried for its tag."""
LIMBS_PER_SIDE = 40
"""The lines of a skeleton are at most 1 / this of its box's mean side wide."""
SAME_INSTANCE_IOU = 0.3
"""Minimum overlap of two boxes in consecutive frames for which the colour is kept."""

_EDGE = (16, 16, 16)

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


class Annotator:
    """Draws the instances of one source, frame after frame.

    The colour of an instance is that of its track. Without tracks it is the colour of the instance
    in the previous frame whose box overlaps most, so that colours do not change with the order of
    the instances, which are sorted by score.

    Args:
        label_names: the model's class names, indexed by label.
        keypoints: the model's keypoints; None draws no skeletons.
    """

    def __init__(self, label_names: Sequence[str], keypoints: Keypoints | None = None) -> None:
        self._label_names = label_names
        self._keypoints = keypoints
        self._last_boxes = np.zeros((0, 4), np.float32)
        self._last_colours: list[int] = []

    def draw(self, image: Image.Image, instances: Instances) -> None:
        """Draw into an RGB image in place; its size must be that of ``instances``."""
        colours = self._assign_colours(instances)
        unit = max(1, round(min(image.size) / 360))  # line width in pixels: 2 at 720p
        pen = ImageDraw.Draw(image)
        # Lowest score first, so that the best instance is on top.
        for i in reversed(range(len(instances))):
            colour = palette(colours[i])
            box = instances.boxes[i]
            if instances.masks is not None:
                _draw_mask(image, instances.patch(i), colour, outline=unit)
            pen.rectangle([round(float(v)) for v in box], outline=colour, width=unit)
            if instances.keypoints is not None and self._keypoints is not None:
                width = limb_width(box, unit)
                draw_skeleton(pen, instances.keypoints[i], self._keypoints.skeleton, width)
        font = tag_font(image.size)
        placed: list[Rectangle] = []
        for i in range(len(instances)):  # highest score first, which gets the place at its box
            label = int(instances.labels[i])
            text = f"{self._label_names[label]} {100 * float(instances.scores[i]):.0f}%"
            if instances.track_ids is not None and instances.track_ids[i]:
                text = f"#{instances.track_ids[i]} {text}"
            tag = place_tag(image.size, instances.boxes[i], text, font, placed)
            placed.append(tag)
            draw_tag(pen, tag, text, palette(colours[i]), font)

    def _assign_colours(self, instances: Instances) -> list[int]:
        """Return the number of each instance's colour: its track id, or as in the last frame."""
        if instances.track_ids is not None:
            return [int(track_id) for track_id in instances.track_ids]
        boxes = instances.boxes
        colours = [-1] * len(boxes)
        overlap = _iou(boxes, self._last_boxes)
        while overlap.size and overlap.max() >= SAME_INSTANCE_IOU:
            now, last = np.unravel_index(int(overlap.argmax()), overlap.shape)
            colours[now] = self._last_colours[last]
            overlap[now, :] = overlap[:, last] = 0
        unused = (n for n in range(2 * len(boxes) + 1) if n not in set(colours))
        colours = [next(unused) if colour < 0 else colour for colour in colours]
        self._last_boxes, self._last_colours = boxes.copy(), colours
        return colours


@lru_cache(maxsize=256)
def palette(number: int) -> Colour:
    """Return colour ``number`` of an endless series in which neighbours differ clearly.

    The hue advances by the golden ratio, which spreads consecutive colours evenly.
    """
    return _colour((0.56 + number * 0.618034) % 1, 0.78)


def _colour(hue: float, saturation: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_mask(image: Image.Image, patch: Patch, colour: Colour, outline: int) -> None:
    """Draw one mask over the image, with a transparent area and a solid outline."""
    if not patch.pixels.any():
        return
    inner = np.pad(patch.pixels, 1)
    for _ in range(outline):  # each iteration erodes the mask by one pixel
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    alpha = np.where(inner[1:-1, 1:-1], np.uint8(255 * FILL), np.uint8(255)) * patch.pixels
    image.paste(colour, (patch.x0, patch.y0), Image.fromarray(alpha))


def draw_skeleton(
    pen: ImageDraw.ImageDraw,
    points: NDArray[np.float32],
    skeleton: Sequence[tuple[int, int]],
    width: int,
) -> None:
    """Draw the visible keypoints of one instance, and the lines between them.

    Each line has its own colour and a dark edge, so that it is visible on any image and mask.

    Args:
        pen: draws into the image.
        points: ``[K, 3]`` x and y in pixels, and score.
        skeleton: pairs of indices of keypoints.
        width: width of the lines, pixels.
    """
    visible = points[:, 2] >= VISIBLE
    lines = [
        (limb_colour(number, len(skeleton)), [tuple(points[k, :2].tolist()) for k in pair])
        for number, pair in enumerate(skeleton)
        if visible[list(pair)].all()
    ]
    for _, line in lines:
        pen.line(line, fill=_EDGE, width=width + 2)
    for colour, line in lines:
        pen.line(line, fill=colour, width=width)
    for x, y, _ in points[visible].tolist():
        pen.ellipse(_square(x, y, 0.7 * width + 1), fill=_EDGE)
        pen.ellipse(_square(x, y, 0.7 * width), fill="white")


def limb_width(box: NDArray[np.float32], unit: int) -> int:
    """Return the width of a skeleton's lines in pixels; they are thinner in a small box.

    Args:
        box: ``[4]`` x1 y1 x2 y2 in pixels.
        unit: width of the box's lines, pixels.
    """
    side = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
    return max(1, min(3 * unit, round(side / LIMBS_PER_SIDE)))


def _square(x: float, y: float, radius: float) -> Rectangle:
    return x - radius, y - radius, x + radius, y + radius


@lru_cache(maxsize=1024)
def limb_colour(number: int, count: int) -> Colour:
    """Return the colour of line ``number`` of a skeleton with ``count`` lines, ordered by hue."""
    return _colour(number / count, 0.9)


def place_tag(
    size: tuple[int, int],
    place: Sequence[float] | NDArray[np.float32],
    text: str,
    font: ImageFont.FreeTypeFont,
    placed: Sequence[Rectangle],
) -> Rectangle:
    """Find a free place for a tag: above its box, inside it, or further down.

    If none is free, the tag is placed above the box, or inside it at the image's upper edge.

    Args:
        size: width and height of the image, pixels.
        place: left and top of the box, pixels; further numbers are ignored.
        text: the text of the tag.
        font: the font of the tag.
        placed: the tags that have been placed already.
    """
    ascent, descent = font.getmetrics()
    pad = max(2, ascent // 5)
    width, height = font.getlength(text) + 2 * pad, ascent + descent + pad
    left = min(max(0.0, float(place[0])), max(0.0, size[0] - width))
    above, inside = float(place[1]) - height, max(0.0, float(place[1]))
    tops = [above] if above >= 0 else []
    tops += [inside + step * (height + 1) for step in range(TAG_TRIES)]
    tags = [(left, top, left + width, top + height) for top in tops]
    for tag in tags:
        if tag[3] <= size[1] and not any(_overlap(tag, other) for other in placed):
            return tag
    return tags[0]


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_tag(
    pen: ImageDraw.ImageDraw,
    tag: Rectangle,
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw a tag with ``text`` on a background of ``colour``."""
    pad = max(2, font.getmetrics()[0] // 5)
    pen.rectangle(tag, fill=colour)
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # luma, ITU-R BT.601
    pen.text(
        (tag[0] + pad, tag[1] + pad / 2), text, font=font, fill="black" if is_light else "white"
    )


def tag_font(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """Return the font for tags in an image of this width and height, pixels."""
    return _font(max(11, round(min(size) / 40)))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the intersection over union of boxes ``a [N, 4]`` with ``b [M, 4]``: ``[N, M]``."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    area_a = (a[:, 2:] - a[:, :2]).prod(axis=1)
    area_b = (b[:, 2:] - b[:, :2]).prod(axis=1)
    union = area_a[:, None] + area_b[None, :] - common
    iou: NDArray[np.float32] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return iou
