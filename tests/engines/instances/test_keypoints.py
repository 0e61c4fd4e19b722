from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torchvision.models.detection.keypoint_rcnn import KeypointRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from maskcast.engines.instances import keypoints
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints, decode_heatmaps, find_peaks

CELLS = np.mgrid[:56, :56].astype(np.float32)


def draw_hill(y: float, x: float, width: float = 3.0) -> NDArray[np.float32]:
    """Return a heatmap with its peak at (y, x), in cells."""
    distance = np.hypot(CELLS[0] - y, CELLS[1] - x)
    return np.maximum(8 - distance / width, -4).astype(np.float32)


def upsample(heatmap: NDArray[np.float32], box: NDArray[np.float32]) -> Any:
    width, height = (max(int(np.ceil(side)), 1) for side in box[2:] - box[:2])
    maps = torch.from_numpy(heatmap)[None, None]
    return interpolate(maps, (height, width), mode="bicubic", align_corners=False)[0, 0]


def assert_same_as_torchvision(heatmaps: NDArray[np.float32], boxes: NDArray[np.float32]) -> None:
    """Check that each keypoint is within 0.1 px, or at another place of the same value."""
    points, scores = heatmaps_to_keypoints(torch.from_numpy(heatmaps), torch.from_numpy(boxes))
    found = find_peaks(heatmaps, boxes)
    assert found.dtype == np.float32
    scale = max(1.0, float(np.abs(heatmaps).max(initial=0)))
    np.testing.assert_allclose(found[..., 2], scores.numpy(), atol=1e-5 * scale)
    moved = np.abs(found[..., :2] - points[..., :2].numpy()).max(axis=2) >= 0.1
    for instance, k in np.argwhere(moved):
        box = boxes[instance]
        surface = upsample(heatmaps[instance, k], box)
        sides = np.maximum(box[2:] - box[:2], 1)
        at = (found[instance, k, :2] - box[:2]) / sides * np.ceil(sides) - 0.5
        x, y = np.rint(at).astype(int)
        assert surface[y, x] > surface.max() - 1e-5 * scale


def boxes_of(largest: int) -> st.SearchStrategy[NDArray[np.float32]]:
    start = st.floats(-20, 2000, width=32)
    side = st.floats(0, largest, width=32)
    corners = st.tuples(start, start, side, side)
    return corners.map(lambda b: np.array([[b[0], b[1], b[0] + b[2], b[1] + b[3]]], np.float32))


@settings(max_examples=60)
@given(
    heatmap=arrays(np.float32, (1, 1, 56, 56), elements=st.floats(-30, 30, width=32)),
    box=boxes_of(300),
)
def test_any_heatmap_in_any_box_is_decoded_as_by_torchvision(
    heatmap: NDArray[np.float32], box: NDArray[np.float32]
) -> None:
    assert_same_as_torchvision(heatmap, box)


@settings(max_examples=60)
@given(
    places=st.lists(
        st.tuples(st.floats(-3, 59), st.floats(-3, 59), st.floats(0.3, 9)), min_size=2, max_size=4
    ),
    box=boxes_of(400),
    noise=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_heatmaps_like_those_of_a_network_are_decoded_as_by_torchvision(
    places: list[tuple[float, float, float]], box: NDArray[np.float32], noise: float, seed: int
) -> None:
    hills = np.max([draw_hill(*place) for place in places], axis=0)
    rng = np.random.default_rng(seed)
    maps = hills + rng.normal(0, noise, (1, 3, 56, 56)).astype(np.float32)
    assert_same_as_torchvision(maps.astype(np.float32), box)


@settings(max_examples=60)
@given(box=boxes_of(500), seed=st.integers(0, 999), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_heatmaps_that_were_enlarged_are_decoded_as_by_torchvision(
    box: NDArray[np.float32], seed: int, scale: float
) -> None:
    small = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (1, 4, 28, 28)))
    maps = interpolate(small, (56, 56), mode="bilinear", align_corners=False)
    assert_same_as_torchvision(maps.numpy().astype(np.float32), box)


def test_a_batch_of_boxes_is_decoded_box_by_box() -> None:
    rng = np.random.default_rng(0)
    heatmaps = rng.normal(0, 3, (4, 17, 56, 56)).astype(np.float32)
    boxes = np.float32([[0, 0, 30, 80], [5.5, 7.25, 200.75, 61], [1, 2, 1.5, 2.5], [9, 9, 65, 65]])
    assert_same_as_torchvision(heatmaps, boxes)


def test_no_boxes_give_no_keypoints() -> None:
    none = decode_heatmaps(np.zeros((0, 17, 56, 56), np.float32), np.zeros((0, 4), np.float32))
    assert none.shape == (0, 17, 3)
    assert none.dtype == np.float32


def test_a_box_as_large_as_the_largest_input_takes_little_memory() -> None:
    flat = np.zeros((1, 1, 56, 56), np.float32)  # the largest value may be anywhere
    tracemalloc.start()
    find_peaks(flat, np.float32([[0, 0, 4096, 4096]]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # all pixels are 64 MiB


def test_only_a_part_of_a_clear_heatmap_is_upsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    interpolate = keypoints._Surface._interpolate

    def watched(surface: Any, which: Any) -> Any:
        values = interpolate(surface, which)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(keypoints._Surface, "_interpolate", watched)
    find_peaks(draw_hill(20, 30, 1.0)[None, None], np.float32([[0, 0, 560, 560]]))
    assert sum(sizes) < 560 * 560 / 50


def test_the_score_is_the_probability_that_the_point_is_near() -> None:
    certain = draw_hill(20, 30, 0.2)
    two_places = np.maximum(draw_hill(10, 10, 0.2), draw_hill(40, 40, 0.2) - np.float32(0.01))
    unknown = np.zeros((56, 56), np.float32)
    maps = np.stack([certain, two_places, unknown])[None]
    scores = decode_heatmaps(maps, np.float32([[0, 0, 56, 56]]))[0, :, 2]
    assert scores[0] > 0.9
    assert 0.45 < scores[1] < 0.55
    assert scores[2] < 50 / 56**2
    # A constant does not change a softmax, and logits may be large.
    np.testing.assert_allclose(
        decode_heatmaps(maps + np.float32(300), np.float32([[0, 0, 56, 56]]))[0, :, 2],
        scores,
        atol=1e-3,
    )


@pytest.mark.parametrize(("y", "x"), [(0, 0), (55, 55), (0, 28), (28, 55)])
def test_the_score_at_the_border_counts_cells_inside_only(y: int, x: int) -> None:
    heatmap = np.full((56, 56), -30, np.float32)
    heatmap[y, x] = 0
    found = decode_heatmaps(heatmap[None, None], np.float32([[10, 20, 122, 132]]))
    assert 0.999 < found[0, 0, 2] <= 1
    np.testing.assert_allclose(found[0, 0, :2], [10 + 2 * x + 1, 20 + 2 * y + 1], atol=1)


def expected_similarity(heatmap: NDArray[np.float32], y: float, x: float, blur: float) -> float:
    """Average the similarity exp(-d^2 / 2 blur^2) to a cell over the softmax of a heatmap."""
    mass = np.exp(heatmap.astype(np.float64) - heatmap.max())
    distance = (CELLS[0] - y) ** 2 + (CELLS[1] - x) ** 2
    return float((mass * np.exp(-distance / (2 * blur**2))).sum() / mass.sum())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1.0, 5.0, 100.0]),
    blur=st.floats(0.5, 20),
    box=boxes_of(400),
)
def test_a_blurred_position_is_in_the_cell_with_the_largest_expected_similarity(
    seed: int, scale: float, blur: float, box: NDArray[np.float32]
) -> None:
    heatmap = np.random.default_rng(seed).normal(0, scale, (56, 56)).astype(np.float32)
    (found,) = decode_heatmaps(heatmap[None, None], box, blur)[0]
    sides = np.maximum(box[0, 2:] - box[0, :2], 1)
    x, y = (found[:2].astype(np.float64) - box[0, :2]) / sides * 56
    slack = 0.01 + 56 * 2**-13 / sides.min()  # of float32 at 2,000 pixels
    assert -slack <= min(x, y) <= max(x, y) <= 56 + slack
    best = max(expected_similarity(heatmap, *cell, blur) for cell in np.ndindex(56, 56))
    cells = {
        (int(np.clip(y + dy, 0, 55)), int(np.clip(x + dx, 0, 55)))
        for dy in (-slack, slack)
        for dx in (-slack, slack)
    }
    reached = max(expected_similarity(heatmap, *cell, blur) for cell in cells)
    assert reached >= best * (1 - 1e-4)
    assert 0 <= found[2] <= 1


@pytest.mark.parametrize(("y", "x"), [(28.5, 27.5), (20.0, 33.25), (30.7, 24.1)])
@pytest.mark.parametrize("blur", [1.0, 6.0])
def test_a_blurred_position_is_exact_between_cells(y: float, x: float, blur: float) -> None:
    hill = -((CELLS[0] + 0.5 - y) ** 2 + (CELLS[1] + 0.5 - x) ** 2) / (2 * 1.5**2)
    found = decode_heatmaps(hill[None, None], np.float32([[10, 20, 66, 132]]), blur)
    np.testing.assert_allclose(found[0, 0, :2], [10 + x, 20 + 2 * y], atol=0.02)


def test_blur_prefers_a_wide_peak_to_a_lone_one() -> None:
    wide = draw_hill(40, 40, 3.0)
    heatmap = np.maximum(wide, draw_hill(10, 10, 0.2) + np.float32(0.5))
    box = np.float32([[0, 0, 56, 56]])
    sharp, blurred = (decode_heatmaps(heatmap[None, None], box, blur)[0, 0] for blur in (0, 6))
    np.testing.assert_allclose(sharp[:2], 10.5, atol=1)
    np.testing.assert_allclose(blurred[:2], 40.5, atol=1)
    assert blurred[2] > sharp[2]


def test_the_points_of_a_person_are_those_of_torchvisions_weights() -> None:
    names = KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]
    assert list(COCO_PERSON.names) == names
    assert len(COCO_PERSON) == 17


def test_a_mirror_swaps_left_and_right() -> None:
    points = Keypoints(("nose", "left_eye", "right_eye", "left_alone"))
    assert points.mirrored == (0, 2, 1, 3)
    mirrored = COCO_PERSON.mirrored
    assert [mirrored[i] for i in mirrored] == list(range(17))
    assert COCO_PERSON.names[mirrored[5]] == "right_shoulder"


def test_the_skeleton_joins_every_point_of_a_person_and_no_pair_twice() -> None:
    assert {place for line in COCO_PERSON.skeleton for place in line} == set(range(17))
    assert len({frozenset(line) for line in COCO_PERSON.skeleton}) == 19


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"names": []}, "length >= 1"),
        ({"names": ["a", "a"]}, "same name"),
        ({"names": ["a", "b"], "skeleton": [[0, 2]]}, "an index that is not below 2"),
        ({"names": ["a", "b"], "skeleton": [[0, -1]]}, ">= 0"),
        ({"names": ["a", ""]}, "length >= 1"),
    ],
)
def test_invalid_keypoints_are_refused(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(content, Keypoints)
