"""Source kinds: which source an address asks for."""

from __future__ import annotations

import threading
from pathlib import Path

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.sources.images import IMAGE_SUFFIXES, ImageSource
from maskcast.pipeline.sources.live import LiveSource
from maskcast.pipeline.sources.pattern import PatternSource, pattern_format
from maskcast.pipeline.sources.source import Source
from maskcast.pipeline.sources.state import OnStateChange
from maskcast.pipeline.sources.video import VideoSource
from maskcast.pipeline.url import is_device, local_path, redact, scheme


def open_source(
    config: SourceConfig,
    on_change: OnStateChange | None = None,
    stopping: threading.Event | None = None,
) -> Source:
    """Open what ``config.url`` names and get its first picture.

    What is not on this machine, and a camera, is tried until it answers.

    Args:
        config: the source.
        on_change: called with a live source's changes of state, on the calling thread.
        stopping: set, from any thread, it ends a live source's opening and iteration.

    Raises:
        InputError: there is nothing there, it cannot be read, or it holds no pictures.
        SourceLostError: it was stopped before it answered.
    """
    check_address(config.url)
    match scheme(config.url):
        case "test":
            return PatternSource(config)
        case "" | "file" if not is_device(config.url):
            path = local_path(config.url)
            if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
                return ImageSource(config)
            return VideoSource(config)
        case _:
            return LiveSource(config, on_change, stopping)


def is_live(config: SourceConfig) -> bool:
    """Tell from its address and policy whether a source's pictures come at their own pace."""
    match scheme(config.url):
        case "test":
            return config.policy != "block"
        case "" | "file":
            return is_device(config.url)
        case _:
            return True


def check_address(url: str) -> None:
    """Find, without opening anything, what is certainly wrong with an address.

    Raises:
        InputError: the scheme is unknown, the test pattern is none, or no such file is there.
    """
    match scheme(url):
        case "http" | "https" | "rtsp" | "rtsps":
            return
        case "test":
            pattern_format(url)
        case "" | "file":
            _check_path(local_path(url))
        case unknown:
            raise InputError(
                f"{redact(url)}: the scheme {unknown!r} is not known; give a file, a folder "
                "of images, http(s)://, rtsp(s)://, /dev/videoN or test://WIDTHxHEIGHT@FPS"
            )


def _check_path(path: Path) -> None:
    try:
        if path.exists():
            return
    except (OSError, ValueError):  # too long for a path, or with a zero byte in it
        pass
    if is_device(str(path)):
        raise InputError(f"{path}: there is no such camera; plug it in, or see `ls /dev/video*`")
    raise InputError(f"{path}: there is no such file or folder; check the path")
