"""Folders as sources: images, or videos."""

from __future__ import annotations

from pathlib import Path

from maskcast.engines.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
    | {".ts", ".webm", ".wmv"}
)


def holds_videos(folder: Path) -> bool:
    """Tell whether a folder contains videos and no images."""
    suffixes = {file.suffix.lower() for file in _files(folder)}
    return not suffixes & IMAGE_SUFFIXES and bool(suffixes & VIDEO_SUFFIXES)


def list_files(path: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files with these suffixes in a folder, by name; for a file, the file.

    Raises:
        InputError: the folder cannot be read, or contains no such file.
    """
    if not path.is_dir():
        return [path]
    found = [file for file in _files(path) if file.suffix.lower() in suffixes]
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise InputError(f"{path}: the folder contains no images and no videos ({kinds})")
    return found


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
