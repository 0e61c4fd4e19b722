"""Drawing of zones and lines, with their counts."""

from __future__ import annotations

from PIL import Image, ImageDraw

from maskcast.pipeline.outputs.draw import Colour, draw_tag, palette, place_tag, tag_font
from maskcast.pipeline.tracking.analysis import Analysis

FILL = 40
"""Opacity of a zone, 0..255."""

LINE_COLOUR = (255, 214, 10)


def draw_regions(image: Image.Image, analysis: Analysis) -> None:
    """Draw a source's zones and lines into an RGB image in place.

    A zone's name is followed by its count, and a line's name by its crossings, if they are known. A
    line has an arrow that points forward.
    """
    if analysis.config is None:
        return
    unit = max(1, round(min(image.size) / 360))
    for number, zone in enumerate(analysis.config.zones):
        colour = palette(7 + 3 * number)
        corners = [(x * image.width, y * image.height) for x, y in zone.polygon]
        area = Image.new("L", image.size)
        ImageDraw.Draw(area).polygon(corners, fill=FILL)
        image.paste(colour, (0, 0), area)
        pen = ImageDraw.Draw(image)
        pen.line([*corners, corners[0]], fill=colour, width=unit, joint="curve")
        count = f": {analysis.zones[zone.name]}" if zone.name in analysis.zones else ""
        top = min(corners, key=lambda corner: (corner[1], corner[0]))
        _write(pen, image, top, zone.name + count, colour)
    for line in analysis.config.lines:
        pen = ImageDraw.Draw(image)
        (x0, y0), (x1, y1) = ends = [(x * image.width, y * image.height) for x, y in line.points]
        pen.line(ends, fill=LINE_COLOUR, width=2 * unit)
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        along = ((x1 - x0) / length, (y1 - y0) / length)
        left = (along[1], -along[0])
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        tip = (middle[0] + 16 * unit * left[0], middle[1] + 16 * unit * left[1])
        pen.line([middle, tip], fill=LINE_COLOUR, width=2 * unit)
        wings = [
            (
                tip[0] - 7 * unit * (left[0] + side * along[0] * 0.7),
                tip[1] - 7 * unit * (left[1] + side * along[1] * 0.7),
            )
            for side in (-1, 1)
        ]
        pen.polygon([tip, *wings], fill=LINE_COLOUR)
        counts = [
            f"{count} {direction}"
            for direction, count in analysis.lines.get(line.name, {}).items()
            if line.direction in ("both", direction)
        ]
        text = f"{line.name}: {', '.join(counts)}" if counts else line.name
        quarter = ((3 * x0 + x1) / 4, (3 * y0 + y1) / 4)
        _write(pen, image, quarter, text, LINE_COLOUR)


def _write(
    pen: ImageDraw.ImageDraw,
    image: Image.Image,
    place: tuple[float, float],
    text: str,
    colour: Colour,
) -> None:
    font = tag_font(image.size)
    draw_tag(pen, place_tag(image.size, place, text, font, ()), text, colour, font)
