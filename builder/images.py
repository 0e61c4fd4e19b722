"""Calibration images, on which int8 ranges are measured."""

from __future__ import annotations

from pathlib import Path

import av

from maskcast.engines.bundle import Input
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.image_file import read_image

_MAX_IMAGES = 200
"""More images hardly change the ranges."""


def read_calibration_images(folder: Path, shape: Input) -> list[NetworkImage]:
    """Read up to 200 images of a folder, resized to the network's input. Other files are skipped.

    Raises:
        InputError: there is no such folder, or no readable image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of images")
    images: list[NetworkImage] = []
    for path in sorted(folder.iterdir()):
        try:
            rgb = read_image(path)
        except InputError:
            continue
        images.append(fit_image(av.VideoFrame.from_ndarray(rgb, "rgb24"), 0, shape))
        if len(images) == _MAX_IMAGES:
            break
    if not images:
        raise InputError(f"{folder}: holds no readable image; give a folder of images")
    return images
