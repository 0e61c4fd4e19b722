"""The preprocess kernel, compiled for the host from the GPU's source, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from maskcast.engines.tensorrt.plugins import launch


def prepare(kernels, pictures, contents, height, width, *, pad=114.0, dtype="f4"):
    pictures = [np.ascontiguousarray(picture) for picture in pictures]
    images = np.full((len(pictures) + 1, 3, height, width), 77, dtype)
    task = launch.preprocess(
        [
            launch.Picture(picture.ctypes.data, *picture.shape[:2], *content)
            for picture, content in zip(pictures, contents, strict=True)
        ],
        images.ctypes.data,
        height=height,
        width=width,
        pad_value=pad,
        dtype="f16" if dtype == "f2" else "f32",
    )
    kernels.run(task)
    assert (images[-1] == 77).all()
    return images[:-1]


def expected(pictures, contents, height, width, pad=114.0):
    images = np.full((len(pictures), 3, height, width), pad, "f4")
    for image, picture, (h, w) in zip(images, pictures, contents, strict=True):
        planar = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        image[:, :h, :w] = interpolate(planar, (h, w), mode="bilinear", align_corners=False)[0]
    return images


@given(
    seed=st.integers(0, 2**32 - 1),
    sources=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    content=st.tuples(st.integers(1, 64), st.integers(1, 96)),
)
@settings(max_examples=40, deadline=None)
def test_it_resizes_and_pads_as_torch_does(host_kernels, seed, sources, content):
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sources]
    contents = [content] * len(pictures)
    images = prepare(host_kernels, pictures, contents, 64, 96)
    np.testing.assert_allclose(images, expected(pictures, contents, 64, 96), atol=2e-3)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_picture_that_has_its_size_already_is_converted_exactly(host_kernels, dtype):
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    images = prepare(host_kernels, [picture], [(50, 70)], 64, 96, pad=0.0, dtype=dtype)
    np.testing.assert_array_equal(images[0, :, :50, :70], picture.transpose(2, 0, 1))
    assert (images[0, :, 50:] == 0).all()
    assert (images[0, :, :, 70:] == 0).all()


def test_as_many_pictures_as_one_launch_takes(host_kernels):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (9, 5, 3), np.uint8) for _ in range(launch.MAX_PICTURES)]
    contents = [(32, 20)] * len(pictures)
    images = prepare(host_kernels, pictures, contents, 32, 32)
    np.testing.assert_allclose(images, expected(pictures, contents, 32, 32), atol=2e-3)
