"""The pictures that int8 finds its ranges with."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from maskcast.engines.bundle import Input
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage, fit_image

_MOST_PICTURES = 200
"""Ranges hardly move after so many."""


def read_pictures(folder: Path, shape: Input) -> list[NetworkImage]:
    """Read up to 200 pictures of a folder as the network would see them.

    Raises:
        InputError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    images = []
    for path in sorted(folder.iterdir()):
        try:
            with Image.open(path) as picture:
                rgb = np.array(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError):
            continue  # captions, folders and the like may lie beside the pictures
        images.append(fit_image(av.VideoFrame.from_ndarray(rgb, "rgb24"), 0, shape))
        if len(images) == _MOST_PICTURES:
            break
    if not images:
        raise InputError(f"{folder}: holds no picture")
    return images
