"""``maskcast zones``: a frame with a grid of fractions, and a configuration's zones and lines."""

from __future__ import annotations

import threading
from pathlib import Path

from PIL import Image, ImageDraw

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig, name_sources
from maskcast.pipeline.configuration.config_file import load_config
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.draw import tag_font
from maskcast.pipeline.outputs.regions import draw_regions
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import SourceLostError
from maskcast.pipeline.tracking.analysis import Analysis
from maskcast.pipeline.url import redact

STEPS = 10
"""Number of grid cells in each direction."""


def draw_zones(url: str | None, config: Path | None, out: Path) -> SourceConfig:
    """Write a source's first frame, with a grid and its zones and lines, as a PNG.

    Args:
        url: a URL, or with ``config`` the name or URL of one of its sources; None for its only one.
        config: a configuration file, for its zones and lines; None for the grid alone.
        out: the PNG file.

    Returns:
        The source.

    Raises:
        InputError: the source cannot be read, the configuration has a mistake or no such source, or
            the file cannot be written.
    """
    source = choose_source(url, config)
    frame = first_frame(source)
    image = Image.fromarray(frame.image())
    draw_grid(image)
    draw_regions(image, Analysis(config=source))
    try:
        image.save(out, "PNG")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    return source


def choose_source(url: str | None, config: Path | None) -> SourceConfig:
    """Return the source to show, with the zones and lines that the configuration has for it.

    Raises:
        InputError: see ``draw_zones``.
    """
    if config is None:
        if url is None:
            raise InputError("no source: give a clip, a camera, or a configuration with --config")
        return SourceConfig(url=url)
    sources = name_sources(load_config(config).sources)
    names = ", ".join(source.name or "" for source in sources) or "none"
    if url is None:
        if len(sources) != 1:
            raise InputError(f"{config}: it has {len(sources)} sources; name one of: {names}")
        return sources[0]
    for source in sources:
        if url in (source.name, source.url):
            return source
    raise InputError(f"{config}: no source {redact(url)!r}; it has: {names}")


def first_frame(config: SourceConfig) -> Frame:
    """Return the first frame of a source.

    Raises:
        InputError: it cannot be read, or delivers no frame within ``open_timeout_s``.
    """
    stopping = threading.Event()
    limit = threading.Timer(config.open_timeout_s, stopping.set)
    limit.daemon = True
    limit.start()
    try:
        with create_source(config, stopping=stopping) as source:
            for frame in source:
                return frame
    except SourceLostError as error:
        if not stopping.is_set():
            raise InputError(str(error)) from None
    finally:
        limit.cancel()
    raise InputError(
        f"{redact(config.url)}: no frame within {config.open_timeout_s:g} s; check the address"
    )


def draw_grid(image: Image.Image) -> None:
    """Draw lines at each tenth of the width and height into an RGB image, with their numbers."""
    unit = max(1, round(min(image.size) / 720))
    grid = Image.new("L", image.size)
    pen = ImageDraw.Draw(grid)
    for step in range(1, STEPS):
        x, y = step * image.width / STEPS, step * image.height / STEPS
        opacity = 200 if step == STEPS // 2 else 110
        pen.line([(x, 0), (x, image.height)], fill=opacity, width=unit)
        pen.line([(0, y), (image.width, y)], fill=opacity, width=unit)
    image.paste((255, 255, 255), (0, 0), grid)
    pen, font = ImageDraw.Draw(image), tag_font(image.size)
    for step in range(STEPS):
        x, y = step * image.width / STEPS, step * image.height / STEPS
        for position in ((x + 3, 2), (3, y + 2)):
            pen.text(
                position, f"{step / STEPS:g}", font=font, fill="white", stroke_fill="black",
                stroke_width=2,
            )  # fmt: skip
