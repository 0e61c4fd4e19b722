"""GroupedNms, compiled for the host from the GPU's source, against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

GUARD = 64
MAX_CANDIDATES = 8192


def suppress(kernels, boxes, scores, groups, *, max_output, iou=0.5, score=0.05, backwards=False):
    """Run the three kernels; also checks that nothing outside keep and workspace is written."""
    images, candidates = scores.shape
    boxes, scores = np.ascontiguousarray(boxes, "f4"), np.ascontiguousarray(scores, "f4")
    groups = np.ascontiguousarray(groups, "i4")
    size = kernels.nms_workspace_bytes(images, candidates)
    workspace = np.full(size + GUARD, 0xAB, np.uint8)
    keep = np.full(images * max_output + GUARD, 77, np.int32)
    kernels.order(backwards=backwards)
    kernels.grouped_nms(
        boxes.ctypes.data, scores.ctypes.data, groups.ctypes.data, keep.ctypes.data,
        workspace.ctypes.data, images=images, candidates=candidates, max_output=max_output,
        iou_threshold=iou, score_threshold=score,
    )  # fmt: skip
    assert (workspace[size:] == 0xAB).all()
    assert (keep[images * max_output :] == 77).all()
    return keep[: images * max_output].reshape(images, max_output)


def expected(boxes, scores, groups, *, max_output, iou=0.5, score=0.05):
    """Run torchvision's nms per group, merge by descending score; the lower index breaks ties."""
    rows = []
    for b, s, g in zip(boxes, scores, groups, strict=True):
        b, s = torch.from_numpy(np.array(b, "f4")), torch.from_numpy(np.array(s, "f4"))
        kept = []
        for group in np.unique(g):
            mine = torch.from_numpy(np.flatnonzero(g == group))
            mine = mine[s[mine] > score]  # a NaN is not greater
            mine = mine[torch.sort(s[mine], descending=True, stable=True).indices]
            if len(mine):  # nms sorts again, but not stably: give it strictly falling scores
                falling = torch.arange(len(mine), 0, -1, dtype=torch.float32)
                kept += mine[nms(b[mine], falling, iou)].tolist()
        kept.sort(key=lambda i: (-s[i].item(), i))
        rows.append((kept + [-1] * max_output)[:max_output])
    return np.array(rows, np.int32).reshape(len(scores), max_output)


def random_candidates(seed, images, candidates, groups, *, side=300, levels=None):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, side, (images, candidates, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 90, corner.shape)], 2).astype("f4")
    scores = rng.uniform(0, 1, (images, candidates)).astype("f4")
    if levels:  # few distinct scores: many ties
        scores = np.round(scores * levels) / np.float32(levels)
    return boxes, scores.astype("f4"), rng.integers(0, groups, (images, candidates), dtype="i4")


@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 3),
    candidates=st.integers(0, 200),
    groups=st.integers(1, 5),
    max_output=st.integers(1, 220),
    iou=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    score=st.sampled_from([-1.0, 0.0, 0.05, 0.5]),
    levels=st.sampled_from([None, 4]),
    backwards=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_it_keeps_what_torchvision_keeps(
    host_kernels, seed, images, candidates, groups, max_output, iou, score, levels, backwards
):
    found = random_candidates(seed, images, candidates, groups, levels=levels)
    limits = {"max_output": max_output, "iou": iou, "score": score}
    keep = suppress(host_kernels, *found, **limits, backwards=backwards)
    np.testing.assert_array_equal(keep, expected(*found, **limits))


@pytest.mark.parametrize("candidates", [63, 64, 65, 128, 4096])
def test_sizes_around_a_word_and_thousands_of_boxes(host_kernels, candidates):
    found = random_candidates(candidates, 1, candidates, 5, side=900)
    keep = suppress(host_kernels, *found, max_output=1000, iou=0.7)
    np.testing.assert_array_equal(keep, expected(*found, max_output=1000, iou=0.7))


def test_the_region_proposals_of_two_images_with_five_levels_of_a_thousand(host_kernels):
    boxes, scores, _ = random_candidates(0, 2, 5000, 5, side=1300)
    levels = np.repeat(np.arange(5, dtype="i4"), 1000)[None].repeat(2, 0)
    keep = suppress(host_kernels, boxes, scores, levels, max_output=1000, iou=0.7, score=0.0)
    wanted = expected(boxes, scores, levels, max_output=1000, iou=0.7, score=0.0)
    np.testing.assert_array_equal(keep, wanted)


def test_the_most_candidates_it_takes(host_kernels):
    boxes, scores, groups = random_candidates(3, 1, MAX_CANDIDATES, 90, side=2000)
    keep = suppress(host_kernels, boxes, scores, groups, max_output=100)
    np.testing.assert_array_equal(keep, expected(boxes, scores, groups, max_output=100))


def test_no_candidates_give_only_padding(host_kernels):
    keep = suppress(host_kernels, *random_candidates(0, 2, 0, 1), max_output=7)
    np.testing.assert_array_equal(keep, np.full((2, 7), -1))


def test_nothing_above_the_score_threshold_gives_only_padding(host_kernels):
    boxes, _, groups = random_candidates(0, 1, 100, 2)
    scores = np.full((1, 100), 0.05, "f4")  # equal to the threshold is not above it
    keep = suppress(host_kernels, boxes, scores, groups, max_output=5, score=0.05)
    np.testing.assert_array_equal(keep, np.full((1, 5), -1))


def test_a_nan_or_infinite_score_never_disturbs_the_others(host_kernels):
    boxes, scores, groups = random_candidates(1, 1, 150, 2)
    scores[0, 3:60:7] = np.nan
    scores[0, 4] = -np.nan
    scores[0, 5], scores[0, 6] = np.inf, -np.inf
    keep = suppress(host_kernels, boxes, scores, groups, max_output=150, score=-2.0)
    np.testing.assert_array_equal(keep, expected(boxes, scores, groups, max_output=150, score=-2.0))
    assert not np.isnan(scores[0, keep[keep >= 0]]).any()


def test_equal_scores_prefer_the_lower_index(host_kernels):
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]], "f4")
    scores = np.array([[0.9, 0.9, 0.9]], "f4")
    keep = suppress(host_kernels, boxes, scores, np.zeros((1, 3), "i4"), max_output=3)
    np.testing.assert_array_equal(keep, [[0, 2, -1]])


def test_zero_and_minus_zero_are_equal_scores(host_kernels):
    boxes = np.array([[[0, 0, 1, 1], [5, 5, 6, 6]]], "f4")
    scores = np.array([[-0.0, 0.0]], "f4")
    keep = suppress(host_kernels, boxes, scores, np.zeros((1, 2), "i4"), max_output=2, score=-1.0)
    np.testing.assert_array_equal(keep, [[0, 1]])


def test_boxes_of_different_groups_never_suppress_one_another(host_kernels):
    boxes = np.zeros((1, 70, 4), "f4") + np.array([0, 0, 10, 10], "f4")
    scores = np.linspace(0.9, 0.1, 70, dtype="f4")[None]
    groups = np.arange(70, dtype="i4")[None]
    keep = suppress(host_kernels, boxes, scores, groups, max_output=70)
    np.testing.assert_array_equal(keep, np.arange(70)[None])


def test_empty_inside_out_and_nan_boxes_behave_as_in_torchvision(host_kernels):
    boxes, scores, groups = random_candidates(5, 1, 120, 1)
    boxes[0, ::9, 2] = boxes[0, ::9, 0]  # no width
    boxes[0, 1::9] = boxes[0, 1::9][:, [2, 3, 0, 1]]  # inside out
    boxes[0, 2::9] = 7.0  # points, all equal
    boxes[0, 3::9, 1] = np.nan
    boxes[0, 4::9, 2] = np.inf
    keep = suppress(host_kernels, boxes, scores, groups, max_output=120)
    np.testing.assert_array_equal(keep, expected(boxes, scores, groups, max_output=120))
