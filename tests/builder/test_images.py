from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from maskcast.builder.images import read_calibration_images
from maskcast.engines.bundle import FixedInput
from maskcast.engines.errors import InputError

SHAPE = FixedInput(96, 160)


def test_calibration_images_are_read_upright_and_other_files_skipped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.fromarray(np.full((100, 50, 3), 200, np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("not an image")
    (image,) = read_calibration_images(tmp_path, SHAPE)
    assert image.pixels.shape == (96, 160, 3)
    assert image.content == (80, 160)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no readable image"):
        read_calibration_images(tmp_path, SHAPE)
    with pytest.raises(InputError, match="no such folder"):
        read_calibration_images(tmp_path / "absent", SHAPE)


def test_an_image_beyond_pillows_limit_is_skipped(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    (image,) = read_calibration_images(tmp_path, SHAPE)
    assert image.source == (10, 10)
