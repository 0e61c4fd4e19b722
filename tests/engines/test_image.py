from __future__ import annotations

import threading
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from maskcast.engines.bundle import FixedInput, LongestSideInput
from maskcast.engines.image import fit_image

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 180, 30), (30, 30, 200), (128, 128, 128)


def quarters(height: int, width: int) -> NDArray[np.uint8]:
    """Return an image that is red and green at the top, blue and grey at the bottom."""
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[: height // 2, : width // 2] = RED
    rgb[: height // 2, width // 2 :] = GREEN
    rgb[height // 2 :, : width // 2] = BLUE
    rgb[height // 2 :, width // 2 :] = GREY
    return rgb


def frame(rgb: NDArray[np.uint8], pixel_format: str = "rgb24") -> av.VideoFrame:
    decoded = av.VideoFrame.from_ndarray(rgb, "rgb24")
    return decoded if pixel_format == "rgb24" else decoded.reformat(format=pixel_format)


def corners(pixels: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """Return the colours at the centres of the four quarters, row by row."""
    height, width = pixels.shape[:2]
    return [
        tuple(int(value) for value in pixels[y, x])
        for y in (height // 4, 3 * height // 4)
        for x in (width // 4, 3 * width // 4)
    ]


def assert_close(found: Any, expected: Any, within: int) -> None:
    assert np.abs(np.array(found, int) - np.array(expected, int)).max() <= within


def test_an_image_of_the_right_size_is_not_changed() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    image = fit_image(frame(rgb), 0, FixedInput(96, 128))
    np.testing.assert_array_equal(image.pixels, rgb)
    assert image.content == image.source == (96, 128)


@pytest.mark.parametrize(
    "pixel_format",
    ["rgb24", "yuv420p", "yuvj420p", "nv12", "yuv422p", "yuv444p", "yuv420p10le", "bgra", "gbrp"],
)
def test_colours_survive_every_pixel_format(pixel_format: str) -> None:
    image = fit_image(frame(quarters(240, 320), pixel_format), 0, LongestSideInput(128))
    assert image.pixels.shape == (96, 128, 3)
    assert image.pixels.flags.c_contiguous
    assert_close(corners(image.pixels), [RED, GREEN, BLUE, GREY], within=4)


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le", "gray16le", "monob"])
def test_grey_images_become_grey_rgb(pixel_format: str) -> None:
    rgb = np.zeros((96, 128, 3), np.uint8)
    rgb[:, 64:] = 255
    image = fit_image(frame(rgb, pixel_format), 0, FixedInput(96, 128))
    assert_close(image.pixels[:, :60], 0, within=2)
    assert_close(image.pixels[:, 68:], 255, within=2)


@pytest.mark.parametrize("source_range", ["limited", "full"])
def test_the_colour_range_is_honoured(source_range: str) -> None:
    from av.video.reformatter import ColorRange

    kind = ColorRange.MPEG if source_range == "limited" else ColorRange.JPEG
    white, black = (235, 16) if source_range == "limited" else (255, 0)
    luma = np.full((64, 96), black, np.uint8)
    luma[:, 48:] = white
    planes = np.concatenate([luma.reshape(-1), np.full(2 * 32 * 48, 128, np.uint8)])
    decoded = av.VideoFrame.from_ndarray(planes.reshape(96, 96), "yuv420p")
    decoded.color_range = kind
    image = fit_image(decoded, 0, FixedInput(64, 96))
    assert_close(image.pixels[:, :40], 0, within=2)
    assert_close(image.pixels[:, 56:], 255, within=2)


def test_the_colour_space_is_honoured() -> None:
    from av.video.reformatter import Colorspace

    planes = np.empty((96, 64), np.uint8)
    planes[:64] = 120
    planes[64:80], planes[80:] = 90, 200  # blue and red differences
    found = []
    for space in (Colorspace.ITU601, Colorspace.ITU709):
        decoded = av.VideoFrame.from_ndarray(planes, "yuv420p")
        decoded.colorspace = space
        found.append(fit_image(decoded, 0, FixedInput(64, 64)).pixels[32, 32].astype(int))
    # ITU-R BT.601 and BT.709: red = 1.164 (Y - 16) + 1.596 or 1.793 (Cr - 128)
    assert_close(found[0][0], 1.164 * 104 + 1.596 * 72, within=3)
    assert_close(found[1][0], min(1.164 * 104 + 1.793 * 72, 255), within=3)


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0, [RED, GREEN, BLUE, GREY]),
        (90, [GREEN, GREY, RED, BLUE]),
        (180, [GREY, BLUE, GREEN, RED]),
        (270, [BLUE, RED, GREY, GREEN]),
        (-90, [BLUE, RED, GREY, GREEN]),
    ],
)
def test_an_image_is_turned_counter_clockwise(rotation: int, expected: Any) -> None:
    image = fit_image(frame(quarters(240, 320), "yuv420p"), rotation, LongestSideInput(128))
    upright = (240, 320) if rotation % 180 == 0 else (320, 240)
    assert image.source == upright
    assert image.pixels.shape[:2] == ((96, 128) if rotation % 180 == 0 else (128, 96))
    assert image.pixels.flags.c_contiguous
    assert_close(corners(image.pixels), expected, within=4)


@pytest.mark.parametrize("rotation", [0, 90])
def test_padding_lies_right_and_below(rotation: int) -> None:
    rgb = np.full((150, 200, 3), 255, np.uint8)
    image = fit_image(frame(rgb), rotation, FixedInput(160, 224, pad_value=7))
    rows, columns = image.content
    assert (rows, columns) == ((160, 213) if rotation == 0 else (160, 120))
    assert (image.pixels[:rows, :columns] == 255).all()
    assert (image.pixels[rows:] == 7).all()
    assert (image.pixels[:, columns:] == 7).all()


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 33), (3, 5), (241, 321), (6000, 8000), (7, 1000)]
)
@pytest.mark.parametrize("pixel_format", ["rgb24", "yuv420p"])
def test_images_of_any_size_fit(height: int, width: int, pixel_format: str) -> None:
    rgb = np.full((height, width, 3), 100, np.uint8)
    for shape in (LongestSideInput(256, 9), FixedInput(128, 256, 9)):
        image = fit_image(frame(rgb, pixel_format), 0, shape)
        assert image.source == (height, width)
        rows, columns = image.content
        assert_close(image.pixels[:rows, :columns], 100, within=3)
        assert (image.pixels[rows:] == 9).all()
        assert (image.pixels[:, columns:] == 9).all()


def test_shrinking_averages_instead_of_skipping() -> None:
    rgb = np.zeros((1080, 1920, 3), np.uint8)
    rgb[:, ::2] = 255  # a grid finer than the smaller image can show
    image = fit_image(frame(rgb), 0, FixedInput(320, 576))
    content = image.pixels[: image.content[0], : image.content[1]]
    assert_close(content, 127, within=40)
    assert abs(content.mean() - 127.5) < 2


def test_threads_do_not_share_a_scaler() -> None:
    decoded = [frame(quarters(240, 320), "yuv420p"), frame(quarters(200, 200), "yuv444p")]
    expected = [fit_image(one, 0, LongestSideInput(128)).pixels for one in decoded]
    wrong = []

    def work(index: int) -> None:
        for _ in range(30):
            pixels = fit_image(decoded[index], 0, LongestSideInput(128)).pixels
            if not np.array_equal(pixels, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_next_image_of_a_thread_leaves_the_pixels_of_the_one_before_alone() -> None:
    first = fit_image(frame(quarters(240, 320)), 0, FixedInput(96, 128))
    before = first.pixels.copy()
    fit_image(frame(np.zeros((240, 320, 3), np.uint8)), 0, FixedInput(96, 128))
    np.testing.assert_array_equal(first.pixels, before)
