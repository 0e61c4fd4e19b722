"""MultiscaleRoiAlign, compiled for the host from the GPU's source, against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign, roi_align


def pool(kernels, features, rois, batch_index, *, size=7, ratio=2, aligned=False, backwards=False):
    """Run the kernel; features are float32 or float16 arrays [B, C, H, W]."""
    features = [np.ascontiguousarray(level) for level in features]
    rois = np.ascontiguousarray(rois, "f4")
    batch_index = np.ascontiguousarray(batch_index, "i4")
    images, channels = features[0].shape[:2]
    pooled = np.full((len(rois) + 1, channels, size, size), 77, features[0].dtype)
    kernels.order(backwards=backwards)
    kernels.roi_align(
        [level.ctypes.data for level in features],
        [level.shape[2:] for level in features],
        rois.ctypes.data,
        batch_index.ctypes.data,
        pooled.ctypes.data,
        images=images,
        boxes=len(rois),
        channels=channels,
        output_size=size,
        sampling_ratio=ratio,
        aligned=aligned,
        half=features[0].dtype == np.float16,
    )
    assert (pooled[len(rois)] == 77).all()
    return pooled[: len(rois)]


def expected(features, rois, batch_index, *, size=7, ratio=2, aligned=False):
    """Run torchvision's roi_align per level, chosen by equation 1 of the FPN paper."""
    rois = torch.from_numpy(np.array(rois, "f4"))
    area = (rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])
    level = torch.floor(4 + torch.log2(torch.sqrt(area) / 224) + 1e-6).clamp(2, 5).long() - 2
    boxes = torch.cat([torch.from_numpy(np.array(batch_index, "f4"))[:, None], rois], 1)
    pooled = torch.zeros(len(rois), features[0].shape[1], size, size)
    for i, feature in enumerate(features):
        mine = level == i
        feature = torch.from_numpy(feature.astype("f4"))
        pooled[mine] = roi_align(feature, boxes[mine], size, 1 / (4 << i), ratio, aligned)
    return pooled.numpy()


def pyramid(rng, images, channels, height, width, dtype="f4"):
    return [
        rng.standard_normal((images, channels, height >> i, width >> i)).astype(dtype)
        for i in range(2, 6)
    ]


def random_rois(rng, count, height, width, images):
    """Boxes of all sizes, from a pixel to the whole image, some reaching far outside."""
    centre = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    half = np.exp(rng.uniform(np.log(0.5), np.log(max(height, width)), (count, 2))) / 2
    return np.concatenate([centre - half, centre + half], 1), rng.integers(0, images, count)


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 12),
    images=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 8]),
    shape=st.sampled_from([(32, 32), (96, 160), (320, 64), (256, 512)]),
    size=st.sampled_from([1, 7, 14]),
    ratio=st.integers(1, 3),
    aligned=st.booleans(),
    backwards=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_it_pools_what_torchvision_pools(
    host_kernels, seed, count, images, channels, shape, size, ratio, aligned, backwards
):
    rng = np.random.default_rng(seed)
    features = pyramid(rng, images, channels, *shape)
    rois = random_rois(rng, count, *shape, images)
    options = {"size": size, "ratio": ratio, "aligned": aligned}
    pooled = pool(host_kernels, features, *rois, **options, backwards=backwards)
    np.testing.assert_allclose(pooled, expected(features, *rois, **options), atol=2e-5)


@pytest.mark.parametrize("size", [7, 14])
def test_half_precision_features_differ_by_one_rounding_only(host_kernels, size):
    rng = np.random.default_rng(0)
    features = pyramid(rng, 2, 16, 256, 384, "f2")
    rois = random_rois(rng, 40, 256, 384, 2)
    pooled = pool(host_kernels, features, *rois, size=size)
    assert pooled.dtype == np.float16
    wanted = expected(features, *rois, size=size)
    np.testing.assert_allclose(pooled, wanted, rtol=2**-10, atol=1e-5)


def test_thousands_of_boxes(host_kernels):
    rng = np.random.default_rng(0)
    features = pyramid(rng, 1, 2, 128, 128)
    rois = random_rois(rng, 4096, 128, 128, 1)
    pooled = pool(host_kernels, features, *rois)
    np.testing.assert_allclose(pooled, expected(features, *rois), atol=2e-5)


def test_no_boxes_pool_to_nothing(host_kernels):
    features = pyramid(np.random.default_rng(0), 1, 4, 64, 64)
    assert pool(host_kernels, features, np.empty((0, 4)), np.empty(0)).shape == (0, 4, 7, 7)


def test_every_level_is_chosen_as_torchvision_chooses_it(host_kernels):
    # Constant features identify the level; sides lie on, just below and just above the borders.
    features = [np.full((1, 1, 1024 >> i, 1024 >> i), i, "f4") for i in range(2, 6)]
    sides = np.array([s + d for s in (1, 112, 224, 448, 896) for d in (-0.01, 0, 0.01)])
    rois = np.stack([0 * sides, 0 * sides, sides, sides], 1).astype("f4")
    align = MultiScaleRoIAlign(["0", "1", "2", "3"], 1, 2)
    maps = {str(i): torch.from_numpy(level) for i, level in enumerate(features)}
    wanted = align(maps, [torch.from_numpy(rois)], [(1024, 1024)]).flatten()
    pooled = pool(host_kernels, features, rois, np.zeros(len(rois)), size=1)
    np.testing.assert_array_equal(pooled.ravel(), wanted.numpy())


def test_boxes_without_area_and_inside_out_boxes_behave_as_in_torchvision(host_kernels):
    features = pyramid(np.random.default_rng(0), 1, 4, 64, 64)
    rois = np.array([[8, 8, 8, 8], [8, 8, 40, 8], [40, 50, 10, 20], [60, 60, 64, 64]])
    for aligned in (False, True):
        pooled = pool(host_kernels, features, rois, np.zeros(4), aligned=aligned)
        wanted = expected(features, rois, np.zeros(4), aligned=aligned)
        np.testing.assert_allclose(pooled, wanted, atol=1e-5)


def test_a_box_outside_the_image_or_of_nan_pools_to_zeros(host_kernels):
    features = pyramid(np.random.default_rng(0), 1, 4, 64, 64)
    rois = np.array([[900, 900, 950, 950], [-500, -500, -400, -400], [np.nan] * 4])
    assert (pool(host_kernels, features, rois, np.zeros(3)) == 0).all()


def test_a_box_of_no_image_pools_to_zeros(host_kernels):
    features = pyramid(np.random.default_rng(0), 2, 4, 64, 64)
    pooled = pool(host_kernels, features, np.array([[0, 0, 32, 32]] * 4), [-1, 0, 1, 2])
    assert (pooled[[0, 3]] == 0).all()
    assert (pooled[[1, 2]] != 0).any()


def test_an_infinite_feature_does_not_spread_to_boxes_elsewhere(host_kernels):
    features = pyramid(np.random.default_rng(0), 1, 1, 64, 64)
    features[0][0, 0, 0, 0] = np.inf
    pooled = pool(host_kernels, features, np.array([[32, 32, 90, 90]]), [0])
    assert np.isfinite(pooled).all()
