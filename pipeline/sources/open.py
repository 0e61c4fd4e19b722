"""Create the source for a URL, and check the URL without opening it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.ffmpeg import screen_name
from maskcast.pipeline.sources.files import IMAGE_SUFFIXES, holds_videos
from maskcast.pipeline.sources.images import ImageSource
from maskcast.pipeline.sources.live import LiveSource
from maskcast.pipeline.sources.pattern import PatternSource, pattern_format
from maskcast.pipeline.sources.source import Source
from maskcast.pipeline.sources.state import OnStateChange
from maskcast.pipeline.sources.video import VideoSource
from maskcast.pipeline.url import (
    STDIN,
    host_and_port,
    is_device,
    is_endless,
    local_path,
    redact,
    scheme,
)


def create_source(
    config: SourceConfig,
    on_change: OnStateChange | None = None,
    stopping: threading.Event | None = None,
) -> Source:
    """Return the source that ``config.url`` names, not yet open.

    Args:
        config: the source.
        on_change: called with every change of a live source's state, on the thread that opens it
            and iterates over it.
        stopping: an event that stops the source when it is set, also while it opens.

    Raises:
        InputError: see ``check_source``.
    """
    check_source(config)
    if scheme(config.url) == "test":
        return PatternSource(config, stopping)
    if is_endless(config.url):
        return LiveSource(config, on_change, stopping)
    if _is_image_source(config.url):
        return ImageSource(config, stopping)
    return VideoSource(config, stopping)


def is_tracked(config: SourceConfig) -> bool:
    """Tell whether a source's instances get track ids; by default only those of video do."""
    if config.track is not None:
        return config.track
    if config.zones or config.lines:
        return True
    return not _is_image_source(config.url)


def is_live(config: SourceConfig) -> bool:
    """Tell from its URL and policy whether a source's frames arrive at their own rate."""
    if scheme(config.url) == "test":
        return config.policy != "block"
    return is_endless(config.url)


def check_source(config: SourceConfig) -> None:
    """Check a source without opening it. A camera that is not there yet is not an error.

    Raises:
        InputError: the URL is malformed, its scheme is unknown, there is no such file, or an option
            does not apply to this kind of source.
    """
    url = config.url
    match scheme(url):
        case "http" | "https" | "rtsp" | "rtsps" | "rtmp" | "udp" as kind:
            try:
                _, port = host_and_port(url)
            except ValueError as error:
                raise InputError(
                    f"{redact(url)}: malformed URL: {error}; check the address"
                ) from None
            if kind == "udp" and not port:
                raise InputError(f"{redact(url)}: the port is missing; give udp://0.0.0.0:PORT")
        case "screen":
            screen_name(url)
        case "test":
            pattern_format(url)
        case "" | "file":
            if url == STDIN and os.isatty(0):
                raise InputError("-: standard input is a terminal; pipe a video into the command")
            if not is_device(url):
                _check_path(local_path(url))
        case "srt" | "rtmps" as kind:
            raise InputError(
                f"{redact(url)}: {kind} is not supported; relay the stream with another program, "
                "for example ffmpeg: see docs/sources.md"
            )
        case unknown:
            raise InputError(
                f"{redact(url)}: unknown scheme {unknown!r}; give a file, a folder, "
                "http(s)://, rtsp(s)://, rtmp://, udp://, /dev/videoN, screen:// or "
                "test://WIDTHxHEIGHT@FPS"
            )
    if config.fps is not None and not _is_image_source(url):
        raise InputError(
            f"{redact(url)}: 'fps' is for folders of images; to limit the rate use 'max_fps'"
        )
    if config.decode not in ("auto", "software") and (
        scheme(url) == "test" or _is_image_source(url)
    ):
        raise InputError(f"{redact(url)}: 'decode' is for video; leave it out")


def _is_image_source(url: str) -> bool:
    if scheme(url) not in ("", "file"):
        return False
    path = local_path(url)
    return path.suffix.lower() in IMAGE_SUFFIXES or (path.is_dir() and not holds_videos(path))


def _check_path(path: Path) -> None:
    try:
        if path.exists():
            return
    except (OSError, ValueError):  # too long for a path, or with a zero byte in it
        pass
    text = str(path)
    if text.isdecimal():
        advice = f"for a camera give /dev/video{text}"
    elif text.partition(":")[0] == "screen":
        advice = "for the screen give screen://"
    elif text.startswith("~"):
        advice = "the shell did not expand '~', because it is quoted; give the full path"
    elif any(sign in text for sign in "*?["):
        advice = "patterns are not expanded here; give the folder, or leave out the quotes"
    else:
        advice = "check the path"
    raise InputError(f"{redact(text)}: no such file or folder; {advice}")
