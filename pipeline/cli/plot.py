"""Plot: a profile as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskcast.pipeline.cli.report import Report, StageReport, Times
from maskcast.pipeline.frame import STAGES
from maskcast.pipeline.monitor.trace import Passage
from maskcast.pipeline.stats import RECORD

WIDTH, HEIGHT = 1200, 860
LEFT, RIGHT = 120, 1160

Colour = tuple[int, int, int]

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLOURS: dict[str, Colour] = {
    "decode": (86, 180, 233),
    "preprocess": (0, 158, 115),
    "infer": (213, 94, 0),
    "masks": (204, 121, 167),
    "publish": (0, 114, 178),
    RECORD: (130, 130, 130),
}
_INK, _FAINT, _GRID, _DROP = (30, 30, 30), (110, 110, 110), (225, 225, 225), (200, 30, 30)
_FINE = 2
"""Drawn so many times larger and made smaller again, which smooths the edges."""


def draw_plot(report: Report, passages: Sequence[Passage], title: str) -> Image.Image:
    """Draw a profile: where a frame's time goes, each stage's times, and latency as it went on.

    Args:
        report: the figures.
        passages: the frames' ways.
        title: what was profiled.

    Returns:
        An RGB picture, ``WIDTH`` x ``HEIGHT``.
    """
    sheet = _Sheet()
    sheet.text(40, 34, title, size=22)
    sheet.text(
        40,
        62,
        f"{report.fps:.1f} frames/s, {report.fps / report.engine_fps:.0%} of the bare engine's "
        f"{report.engine_fps:.1f};  latency p50 {report.latency_ms.p50:.0f} ms, "
        f"p99 {report.latency_ms.p99:.0f} ms;  {report.dropped} of {report.captured} frames "
        f"dropped;  at most {report.peak_bytes / 1e6:.0f} MB",
        colour=_FAINT,
    )
    sheet.text(40, 84, f"Bottleneck: {report.bottleneck}")
    _draw_mean_frame(sheet, report.stages, top=122)
    _draw_stages(sheet, report.stages, top=250)
    _draw_latency(sheet, passages, top=560, bottom=800)
    return sheet.finish()


def write_plot(path: Path, report: Report, passages: Sequence[Passage], title: str) -> None:
    """Write the picture as PNG.

    Raises:
        OSError: it cannot be written.
    """
    draw_plot(report, passages, title).save(path, "PNG")


class _Sheet:
    """A white sheet that is drawn on in pixels of the finished picture."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (_FINE * WIDTH, _FINE * HEIGHT), "white")
        self._pen = ImageDraw.Draw(self._image)

    def box(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        """Fill a rectangle; one that is too thin to be seen is left out."""
        left, upper, right, lower = (round(_FINE * value) for value in (x1, y1, x2, y2))
        if right > left and lower > upper:
            self._pen.rectangle((left, upper, right - 1, lower - 1), fill=colour)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: Colour = _GRID) -> None:
        """Draw a line."""
        self._pen.line([_FINE * value for value in (x1, y1, x2, y2)], fill=colour, width=_FINE)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        colour: Colour = _INK,
        anchor: str = "lm",
    ) -> None:
        """Write a text, placed by Pillow's anchor: by default by the middle of its left edge."""
        font = ImageFont.load_default(_FINE * size)
        self._pen.text((_FINE * x, _FINE * y), text, fill=colour, font=font, anchor=anchor)

    def text_width(self, text: str, size: int = 14) -> float:
        """Measure a text."""
        font = ImageFont.load_default(_FINE * size)
        return self._pen.textlength(text, font=font) / _FINE

    def finish(self) -> Image.Image:
        """Return the picture."""
        return self._image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def _draw_mean_frame(sheet: _Sheet, stages: Mapping[str, StageReport], top: float) -> None:
    """Draw one bar: the mean frame's time, waiting pale and work full."""
    spans = [
        (name, kind, times.mean_ms)
        for name, stage in stages.items()
        if name != RECORD
        for kind, times in (("waits", stage.wait), ("works", stage))
        if times is not None
    ]
    whole_ms = sum(span_ms for _, _, span_ms in spans) or 1.0
    sheet.text(40, top, f"Where a frame's {whole_ms:.1f} ms go (mean)", size=17)
    x = 40.0
    for name, kind, span_ms in spans:
        width = (RIGHT - 40) * span_ms / whole_ms
        full = _COLOURS[name]
        sheet.box(x, top + 18, x + width, top + 54, full if kind == "works" else _pale(full))
        label = f"{span_ms:.1f}"
        if sheet.text_width(label) + 8 < width:
            colour = (255, 255, 255) if kind == "works" else _INK
            sheet.text(x + width / 2, top + 36, label, colour=colour, anchor="mm")
        x += width
    x = 40.0
    for name, stage in stages.items():
        if name == RECORD:
            continue
        sheet.box(x, top + 66, x + 14, top + 80, _COLOURS[name])
        text = f"{name} {stage.share:.0%}"
        sheet.text(x + 20, top + 73, text)
        x += 20 + sheet.text_width(text) + 28
    sheet.text(
        RIGHT,
        top + 73,
        "pale: waits for the stage    full: the stage works",
        anchor="rm",
        colour=_FAINT,
    )


def _draw_stages(sheet: _Sheet, stages: Mapping[str, StageReport], top: float) -> None:
    """Draw each stage's percentiles on one axis, and its busy share at the right."""
    sheet.text(40, top, "Each stage: p50, p95 and p99 of waiting and of work, ms", size=17)
    right = 920.0
    every = [each for stage in stages.values() for each in (stage, stage.wait) if each is not None]
    ticks = nice_ticks(max((times.p99_ms for times in every), default=1.0))
    rows_top, row = top + 28, 36
    bottom = rows_top + row * len(stages)
    scale = (right - LEFT) / ticks[-1]
    for tick in ticks:
        sheet.line(LEFT + tick * scale, rows_top, LEFT + tick * scale, bottom)
        sheet.text(LEFT + tick * scale, bottom + 12, f"{tick:g}", colour=_FAINT, anchor="mm")
    sheet.text(990, top, "busy", size=17)
    for number, (name, stage) in enumerate(stages.items()):
        y = rows_top + row * number
        sheet.text(LEFT - 10, y + row / 2, name, anchor="rm")
        if stage.wait is not None:
            _draw_times(sheet, stage.wait, y + 5, scale, _pale(_COLOURS[name]))
        _draw_times(sheet, stage, y + 18, scale, _COLOURS[name])
        sheet.box(990, y + 9, 1110, y + 27, _GRID)
        sheet.box(990, y + 9, 990 + 120 * min(1.0, stage.busy), y + 27, _COLOURS[name])
        sheet.text(RIGHT, y + row / 2, f"{stage.busy:.0%}", anchor="rm")


def _draw_times(sheet: _Sheet, times: Times, y: float, scale: float, colour: Colour) -> None:
    """Draw a bar to p50, a thin one to p95, and a tick at p99."""
    sheet.box(LEFT, y, LEFT + max(1.0, times.p50_ms * scale), y + 11, colour)
    sheet.box(LEFT, y + 4, LEFT + times.p95_ms * scale, y + 7, colour)
    end = LEFT + max(1.0, times.p99_ms * scale)
    sheet.box(end - 1.5, y, end, y + 11, colour)


def _draw_latency(sheet: _Sheet, passages: Sequence[Passage], top: float, bottom: float) -> None:
    """Draw, over the time, how long frames waited and were worked on, stage upon stage."""
    sheet.text(40, top - 24, "Latency of each frame as time went by, ms", size=17)
    published = [passage for passage in passages if passage.drop is None]
    if not published:
        sheet.text(LEFT, top + 20, "nothing was published", colour=_FAINT)
        return
    base_ns = min(passage.timeline.start_ns["decode"] for passage in passages)
    end_s = max(passage.left_ns - base_ns for passage in passages) / 1e9
    heights = np.cumsum([_parts_ms(passage) for passage in published], axis=1)
    ends_s = np.array([(passage.left_ns - base_ns) / 1e9 for passage in published])
    order = np.argsort(ends_s)
    heights, ends_s = heights[order], ends_s[order]
    ticks_ms = nice_ticks(float(heights[:, -1].max()))
    seconds = nice_ticks(end_s)
    x_scale, y_scale = (RIGHT - LEFT) / seconds[-1], (bottom - top) / ticks_ms[-1]
    for tick in ticks_ms:
        sheet.line(LEFT, bottom - tick * y_scale, RIGHT, bottom - tick * y_scale)
        sheet.text(LEFT - 8, bottom - tick * y_scale, f"{tick:g}", colour=_FAINT, anchor="rm")
    for second in seconds:
        x = LEFT + second * x_scale
        sheet.text(x, bottom + 32, f"{second:g} s", colour=_FAINT, anchor="mm")
    colours = [_COLOURS["decode"]]
    for stage in STAGES[1:]:
        colours += [_pale(_COLOURS[stage]), _COLOURS[stage]]
    for place, column in _columns(ends_s * x_scale, heights):
        floor = 0.0
        for colour, height in zip(colours, column.tolist(), strict=True):
            sheet.box(
                LEFT + place,
                bottom - height * y_scale,
                LEFT + place + 1,
                bottom - floor * y_scale,
                colour,
            )
            floor = height
    dropped = [passage for passage in passages if passage.drop is not None]
    for passage in dropped:
        x = LEFT + (passage.left_ns - base_ns) / 1e9 * x_scale
        sheet.line(x, bottom + 9, x, bottom + 18, _DROP)
    if dropped:
        sheet.text(LEFT - 8, bottom + 14, "drops", colour=_DROP, anchor="rm")


def _parts_ms(passage: Passage) -> list[float]:
    """Return decode's work and every later stage's waiting and work, milliseconds."""
    start_ns, end_ns = passage.timeline.start_ns, passage.timeline.end_ns
    parts = [(end_ns["decode"] - start_ns["decode"]) / 1e6]
    for before, stage in pairwise(STAGES):
        parts.append((start_ns[stage] - end_ns[before]) / 1e6)
        parts.append((end_ns[stage] - start_ns[stage]) / 1e6)
    return parts


def _columns(
    x: NDArray[np.float64], heights: NDArray[np.float64]
) -> list[tuple[int, NDArray[np.float64]]]:
    """Return for each column of pixels the slowest frame in it, or the last one before it."""
    found: list[tuple[int, NDArray[np.float64]]] = []
    first = 0
    for column in range(int(x[0]), int(x[-1]) + 1):
        last = int(np.searchsorted(x, column + 1))
        if last > first:
            found.append((column, heights[first + int(heights[first:last, -1].argmax())]))
            first = last
        else:
            found.append((column, heights[first - 1]))
    return found


def nice_ticks(most: float) -> list[float]:
    """Return ticks from 0 to ``most`` or a little above, 1, 2 or 5 times a power of ten apart."""
    rough = max(most, 1e-6) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    count = int(np.ceil(max(most, 1e-6) / step - 1e-9))
    return [round(step * number, 9) for number in range(count + 1)]


def _pale(colour: Colour) -> Colour:
    red, green, blue = (round(0.62 * 255 + 0.38 * value) for value in colour)
    return red, green, blue
