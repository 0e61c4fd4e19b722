"""The pictures that int8 finds its ranges with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from maskcast.builder.images import read_pictures
from maskcast.engines.bundle import FixedInput
from maskcast.engines.errors import InputError


def test_pictures_for_calibration_are_read_and_other_files_passed_over(tmp_path):
    Image.fromarray(np.full((50, 100, 3), 200, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (image,) = read_pictures(tmp_path, FixedInput(96, 160))
    assert image.pixels.shape == (96, 160, 3)
    assert image.content == (80, 160)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no picture"):
        read_pictures(tmp_path, FixedInput(96, 160))
