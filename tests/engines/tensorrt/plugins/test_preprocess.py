"""The kernels before and after the network, compiled for the host from the GPU's source."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_bytes_become_planar_floats_exactly(host_kernels, count):
    rng = np.random.default_rng(count)
    frames = rng.integers(0, 256, (count, 32, 64, 3), np.uint8)
    images = np.full((count + 1, 3, 32, 64), 77, "f4")
    pointers = [frame.ctypes.data for frame in frames]
    host_kernels.preprocess(pointers, images.ctypes.data, 32 * 64, 0)
    np.testing.assert_array_equal(images[:-1], frames.transpose(0, 3, 1, 2))
    assert (images[-1] == 77).all()


def test_crops_are_rounded_as_numpy_rounds(host_kernels):
    halves = (np.arange(256) + 0.5) / 255
    values = np.concatenate([np.random.default_rng(0).uniform(0, 1, 3000), halves, [0, 1, 0, 1]])
    masks = values.astype("f4")
    crops = np.full(len(masks) + 4, 77, np.uint8)
    host_kernels.crops_to_bytes(masks.ctypes.data, crops.ctypes.data, len(masks), 0)
    inside = np.clip(masks * np.float32(255), 0, 255)
    np.testing.assert_array_equal(crops[:-4], np.rint(inside).astype(np.uint8))
    assert (crops[-4:] == 77).all()


def test_crops_outside_of_their_range_are_clipped_and_nan_is_background(host_kernels):
    masks = np.array([-1, 2, np.nan, np.inf, -np.inf, 1.0000001, -0.0, 0.5], "f4")
    crops = np.empty(8, np.uint8)
    host_kernels.crops_to_bytes(masks.ctypes.data, crops.ctypes.data, 8, 0)
    assert crops.tolist() == [0, 255, 0, 255, 0, 255, 0, 128]
