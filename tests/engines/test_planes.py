"""Which decoded images have planes that a device can convert."""

from __future__ import annotations

import av
import numpy as np
import pytest

from maskcast.engines.planes import conversion, read_planes


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "nv12"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (1, 1)])
def test_planes_are_the_decoders_own_memory(pixel_format, height, width):
    frame = av.VideoFrame(width, height, pixel_format)
    planes = read_planes(frame, 0)
    assert (planes.height, planes.width) == (height, width)
    assert planes.byte_count == height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2)
    memoryview(frame.planes[0])[0] = 99
    assert planes.arrays[0][0, 0] == 99


@pytest.mark.parametrize("pixel_format", ["rgb24", "yuv444p", "yuv420p10le", "gray", "yuyv422"])
def test_other_pixel_formats_have_none(pixel_format):
    assert read_planes(av.VideoFrame(64, 48, pixel_format), 0) is None


def test_a_matrix_that_is_not_known_has_none():
    frame = av.VideoFrame(64, 48, "nv12")
    frame.colorspace = 8  # YCgCo
    assert read_planes(frame, 0) is None


def test_the_planes_outlive_the_frame():
    frame = av.VideoFrame(640, 480, "yuv420p")
    memoryview(frame.planes[0])[:] = bytes([7]) * (640 * 480)
    planes = read_planes(frame, 0)
    del frame
    held = [av.VideoFrame(640, 480, "yuv420p") for _ in range(8)]
    assert (planes.arrays[0] == 7).all()
    assert held


@pytest.mark.parametrize("is_full_range", [True, False])
def test_greys_stay_greys_and_white_is_white(is_full_range):
    made = conversion(0.2126, 0.0722, is_full_range=is_full_range)
    white, black = (255, 0) if is_full_range else (235, 16)
    assert made.luma_scale * (white - made.luma_offset) == pytest.approx(255)
    assert made.luma_scale * (black - made.luma_offset) == 0


@pytest.mark.parametrize(("red", "blue"), [(0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)])
def test_the_conversion_inverts_that_of_the_standard(red, blue):
    made = conversion(red, blue, is_full_range=True)
    rgb = np.array([200.0, 90.0, 30.0])
    y = rgb @ [red, 1 - red - blue, blue]
    u, v = (rgb[2] - y) / (2 * (1 - blue)), (rgb[0] - y) / (2 * (1 - red))
    back = [
        made.luma_scale * y + made.v_to_red * v,
        made.luma_scale * y + made.u_to_green * u + made.v_to_green * v,
        made.luma_scale * y + made.u_to_blue * u,
    ]
    np.testing.assert_allclose(back, rgb)
