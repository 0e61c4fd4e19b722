from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image

TALL = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_an_image_is_turned_upright(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(TALL).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(TALL, turns))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.fromarray(TALL).convert(mode).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.shape == (4, 2, 3)
    assert image.dtype == np.uint8


def test_what_cannot_be_read_is_an_input_error(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="no such image"):
        read_image(path)
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(path)
    Image.fromarray(TALL).save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(path)
    Image.fromarray(TALL).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(InputError, match="larger than"):
        read_image(path)
