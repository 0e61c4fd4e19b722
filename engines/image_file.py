"""Image files: one reader for inference, calibration, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.errors import InputError


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file, turned upright as its EXIF orientation says.

    Returns:
        ``[H, W, 3]`` uint8 RGB.

    Raises:
        InputError: the file is missing, damaged, not an image, or larger than Pillow's limit.
    """
    from PIL import Image, ImageOps  # 4 MB that most runs do not need

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(f"{path}: larger than {limit} megapixels; resize it") from None
    except (OSError, SyntaxError, ValueError):  # what Pillow's decoders raise
        raise InputError(f"{path}: not an image that can be read") from None
