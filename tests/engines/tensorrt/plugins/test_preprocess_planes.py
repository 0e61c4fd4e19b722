"""preprocess_planes, compiled for the host from the GPU's source, against libswscale."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.planes import read_planes
from maskcast.engines.tensorrt.plugins.library import device_planes

BT601, BT709, UNSPECIFIED, BT2020 = 5, 1, 2, 9
LIMITED, FULL = 1, 2

EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
"""Flags for chroma of its own for every pixel; without them two neighbours share it."""


def random_frame(pixel_format, height, width, *, colorspace, color_range, seed=0):
    """Return a frame of random planes, with colours near RGB: libswscale overflows on others."""
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixel_format)
    frame.colorspace, frame.color_range = colorspace, color_range
    rows, columns = -(-height // 2), -(-width // 2)
    y = rng.integers(0, 256 if color_range == FULL else 236, (height, width), np.uint8)
    u, v = rng.integers(16, 241, (2, rows, columns), np.uint8)
    planes = [y, u, v] if pixel_format != "nv12" else [y, np.stack([u, v], -1).reshape(rows, -1)]
    for plane, values in zip(frame.planes, planes, strict=True):
        stride = plane.line_size
        memory = np.ndarray((plane.buffer_size // stride, stride), np.uint8, memoryview(plane))
        memory[:] = 111  # in the padding of rows
        memory[: values.shape[0], : values.shape[1]] = values
    return frame


def convert(kernels, planes, content, shape, pad_value=7.0):
    """Run the kernel on one image; return [H, W, 3]."""
    packed = np.concatenate([np.ascontiguousarray(array).ravel() for array in planes.arrays])
    inputs = np.full((2, 3, *shape), 77, "f4")
    given = device_planes(planes, packed.ctypes.data, content)
    kernels.preprocess_planes([given], inputs.ctypes.data, shape, pad_value, 0)
    assert (inputs[1] == 77).all()
    return inputs[0].transpose(1, 2, 0)


def swscale(frame, height, width, options=EXACT):
    shrinks = height <= frame.height and width <= frame.width
    how = Interpolation.AREA if shrinks else Interpolation.BILINEAR
    scaled = VideoReformatter().reformat(
        frame, width=width, height=height, format="rgb24", interpolation=int(how | options)
    )
    return scaled.to_ndarray().astype(int)


@pytest.mark.parametrize(
    ("pixel_format", "colorspace", "color_range"),
    [*product(("yuv420p", "nv12"), (BT601, BT709, UNSPECIFIED, BT2020), (LIMITED, FULL))],
)
def test_the_conversion_is_that_of_libswscale(host_kernels, pixel_format, colorspace, color_range):
    # The frames do not state where their chroma lies; libswscale then assumes the centre.
    for height, width in ((48, 64), (47, 63), (1, 1), (2, 33)):
        frame = random_frame(
            pixel_format, height, width, colorspace=colorspace, color_range=color_range
        )
        planes = replace(read_planes(frame, 0), chroma_shift=0.0)
        found = convert(host_kernels, planes, (height, width), (64, 64))
        wanted = swscale(frame, height, width)
        assert np.abs(found[:height, :width] - wanted).max() <= 2, (height, width)
        assert (found[height:] == 7).all()
        assert (found[:, width:] == 7).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_resizing_is_the_area_filter_of_libswscale(host_kernels, data):
    height, width = data.draw(st.integers(16, 200)), data.draw(st.integers(16, 200))
    if data.draw(st.booleans(), label="shrinks"):  # libswscale is inexact for a side of 1
        content = (data.draw(st.integers(2, height)), data.draw(st.integers(2, width)))
    else:
        content = (height + data.draw(st.integers(0, 60)), width + data.draw(st.integers(0, 60)))
    frame = random_frame(
        data.draw(st.sampled_from(["yuv420p", "nv12"])),
        height,
        width,
        colorspace=data.draw(st.sampled_from([BT601, BT709])),
        color_range=data.draw(st.sampled_from([LIMITED, FULL])),
        seed=data.draw(st.integers(0, 1000)),
    )
    planes = replace(read_planes(frame, 0), chroma_shift=0.0)
    found = convert(host_kernels, planes, content, content)
    assert np.abs(found - swscale(frame, *content)).max() <= 2


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_turned_image_is_the_upright_one_turned(host_kernels, rotation):
    frame = random_frame("nv12", 70, 101, colorspace=BT709, color_range=LIMITED)
    lying = convert(host_kernels, read_planes(frame, 0), (35, 50), (64, 64))[:35, :50]
    content = (35, 50) if rotation % 180 == 0 else (50, 35)
    found = convert(host_kernels, read_planes(frame, rotation), content, (64, 64))
    rows, columns = content
    np.testing.assert_array_equal(found[:rows, :columns], np.rot90(lying, rotation // 90))


def test_a_decoded_video_is_converted_as_by_libswscale(host_kernels, make_clip):
    def draw(index, width, height):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / 9 + index), np.cos(y / 7), np.sin((x + y) / 13)]
        return np.uint8(127 + 90 * np.stack(waves, -1))

    clip = make_clip(width=322, height=182, frames=1, draw=draw)
    with av.open(str(clip)) as container:
        frame = next(container.decode(video=0))
    found = convert(host_kernels, read_planes(frame, 0), (88, 156), (88, 156))
    assert np.abs(found - swscale(frame, 88, 156)).max() <= 2  # the decoder states: chroma is left
    difference = np.abs(found - swscale(frame, 88, 156, Interpolation(0)))
    assert difference.mean() < 5  # engines on the CPU get this one: two neighbours share chroma


def test_images_of_many_sizes_go_in_one_batch(host_kernels):
    shape, rng = (32, 64), np.random.default_rng(0)
    frames = [
        random_frame(
            ("nv12", "yuv420p")[i % 2], *rng.integers(2, 90, 2), colorspace=1, color_range=1, seed=i
        )
        for i in range(40)
    ]
    contents = [(int(rng.integers(1, 33)), int(rng.integers(1, 65))) for _ in frames]
    planes = [read_planes(frame, 90 * (i % 4)) for i, frame in enumerate(frames)]
    alone = [convert(host_kernels, *pair, shape) for pair in zip(planes, contents, strict=True)]
    packed = [
        np.concatenate([np.ascontiguousarray(array).ravel() for array in one.arrays])
        for one in planes
    ]
    given = [
        device_planes(one, memory.ctypes.data, content)
        for one, memory, content in zip(planes, packed, contents, strict=True)
    ]
    inputs = np.full((41, 3, *shape), 77, "f4")
    for backwards in (False, True):
        host_kernels.order(backwards=backwards)
        host_kernels.preprocess_planes(given, inputs.ctypes.data, shape, 7.0, 0)
        np.testing.assert_array_equal(inputs[:-1].transpose(0, 2, 3, 1), alone)
        assert (inputs[-1] == 77).all()
    host_kernels.order(backwards=False)
