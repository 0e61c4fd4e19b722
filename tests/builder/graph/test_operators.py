from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torchvision.ops import MultiScaleRoIAlign, batched_nms

from maskcast.builder.graph.operators import (
    DOMAIN,
    OPSET,
    PLUGIN_ATTRIBUTES,
    function_bodies,
    grouped_nms,
    multiscale_roi_align,
)

LEVELS = ("p2", "p3", "p4", "p5")


def one_node_model(
    operator: str, inputs: dict[str, Any], output: int, **attributes: Any
) -> onnxruntime.InferenceSession:
    """Open a model of one of the operators, which runs its function body."""
    rank = 4 if operator == "MultiscaleRoiAlign" else 2
    node = helper.make_node(
        operator, list(inputs), ["output"], domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES
    )
    graph = helper.make_graph(
        [node],
        operator,
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info("output", output, [None] * rank)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=function_bodies(bool(attributes.get("aligned"))),
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def run_roi_align(
    features: list[torch.Tensor], rois: torch.Tensor, images: torch.Tensor, aligned: bool
) -> np.ndarray[Any, Any]:
    values = [*(level.numpy() for level in features), rois.numpy(), images.numpy()]
    inputs = dict(zip((*LEVELS, "rois", "batch_index"), values, strict=True))
    kind = helper.np_dtype_to_tensor_dtype(values[0].dtype)
    session = one_node_model(
        "MultiscaleRoiAlign",
        inputs,
        kind,
        output_size=7,
        sampling_ratio=2,
        aligned=int(aligned),
    )
    output: np.ndarray[Any, Any] = session.run(None, inputs)[0]
    return output


def random_features(batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 8, 256 // s, 320 // s, generator=generator) for s in (4, 8, 16, 32)]


def random_rois(count: int) -> torch.Tensor:
    """Make regions of all sizes, some of them partly outside the image."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([320.0, 256.0]) - 10
    side = torch.exp(torch.rand(count, 2, generator=generator) * 6)
    return torch.cat([corner, corner + side], dim=1)


def test_roi_align_pools_as_torchvision_does() -> None:
    features, rois = random_features(), random_rois(60)
    images = torch.arange(60, dtype=torch.int32) % 2
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    # torchvision takes boxes image by image.
    order = images.argsort(stable=True)
    expected = pool(
        {str(number): level for number, level in enumerate(features)},
        [rois[images == image] for image in (0, 1)],
        [(256, 320)] * 2,
    )
    pooled = multiscale_roi_align(*features, rois, images, 7, 2, False)
    torch.testing.assert_close(pooled[order], expected)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_body_of_roi_align_computes_what_the_reference_does(aligned: bool) -> None:
    features, rois = random_features(), random_rois(60)
    images = torch.arange(60, dtype=torch.int32) % 2
    expected = multiscale_roi_align(*features, rois, images, 7, 2, aligned)
    np.testing.assert_allclose(
        run_roi_align(features, rois, images, aligned), expected.numpy(), atol=1e-5
    )


def test_alignment_changes_what_is_pooled() -> None:
    features, rois = random_features(1), random_rois(4)
    images = torch.zeros(4, dtype=torch.int32)
    aligned, unaligned = (
        multiscale_roi_align(*features, rois, images, 7, 2, choice) for choice in (True, False)
    )
    assert (aligned - unaligned).abs().max() > 0.01


def test_an_empty_region_is_pooled_from_the_finest_level_and_is_finite() -> None:
    features, rois = random_features(1), torch.zeros(1, 4)
    images = torch.zeros(1, dtype=torch.int32)
    expected = multiscale_roi_align(*features, rois, images, 7, 2, False)
    assert expected.isfinite().all()
    pooled = run_roi_align(features, rois, images, aligned=False)
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-5)


def test_half_precision_features_give_half_precision_regions() -> None:
    features = [level.half() for level in random_features(1)]
    rois, images = random_rois(8), torch.zeros(8, dtype=torch.int32)
    expected = multiscale_roi_align(*features, rois, images, 7, 2, False)
    assert expected.dtype == torch.float16
    pooled = run_roi_align(features, rois, images, aligned=False)
    assert pooled.dtype == np.float16
    np.testing.assert_allclose(pooled, expected.numpy(), atol=2e-3)


def run_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    max_output: int = 20,
) -> np.ndarray[Any, Any]:
    """Run both implementations, which must agree."""
    reference = grouped_nms(boxes, scores, groups, iou_threshold, score_threshold, max_output)
    inputs = {"boxes": boxes.numpy(), "scores": scores.numpy(), "groups": groups.numpy()}
    session = one_node_model(
        "GroupedNms",
        inputs,
        TensorProto.INT32,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        max_output=max_output,
    )
    keep: np.ndarray[Any, Any] = session.run(None, inputs)[0]
    assert keep.dtype == np.int32
    np.testing.assert_array_equal(keep, reference.numpy())
    return keep


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), count=st.integers(1, 60))
def test_nms_keeps_what_torchvision_keeps_in_each_group(seed: int, batch: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * 60
    side = 1 + torch.rand(batch, count, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + side], dim=-1)
    scores = torch.rand(batch, count, generator=generator)
    groups = torch.randint(0, 40, (batch, count), generator=generator, dtype=torch.int32)
    keep = run_nms(boxes, scores, groups)
    for image in range(batch):
        candidates = torch.where(scores[image] > 0.05)[0]
        expected = candidates[
            batched_nms(
                boxes[image, candidates], scores[image, candidates], groups[image, candidates], 0.5
            )
        ][:20]
        found = keep[image][keep[image] >= 0]
        np.testing.assert_array_equal(found, expected.numpy())
        assert (keep[image][len(found) :] == -1).all()


def test_boxes_of_different_groups_do_not_suppress_one_another() -> None:
    boxes = torch.tensor([[[10.0, 10.0, 50.0, 50.0]] * 3])
    scores = torch.tensor([[0.7, 0.9, 0.8]])
    different = run_nms(boxes, scores, torch.tensor([[0, 17, 33]], dtype=torch.int32))
    assert different[0, :4].tolist() == [1, 2, 0, -1]
    same = run_nms(boxes, scores, torch.zeros(1, 3, dtype=torch.int32))
    assert same[0, :2].tolist() == [1, -1]


def test_of_equal_scores_the_lower_index_comes_first() -> None:
    boxes = torch.tensor([[[10.0 * k, 0.0, 10.0 * k + 5, 5.0] for k in range(4)]])
    keep = run_nms(boxes, torch.full((1, 4), 0.5), torch.zeros(1, 4, dtype=torch.int32))
    assert keep[0, :4].tolist() == [0, 1, 2, 3]


def test_low_scores_and_nan_are_never_kept() -> None:
    boxes = torch.tensor([[[10.0 * k, 0.0, 10.0 * k + 5, 5.0] for k in range(4)]])
    scores = torch.tensor([[0.05, 0.9, float("nan"), -1.0]])
    keep = run_nms(boxes, scores, torch.zeros(1, 4, dtype=torch.int32))
    assert keep[0].tolist() == [1] + [-1] * 19


def test_no_candidate_gives_nothing_but_padding() -> None:
    keep = run_nms(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32))
    assert (keep == -1).all()


def test_the_best_are_kept_when_more_are_left_than_asked_for() -> None:
    boxes = torch.tensor([[[10.0 * k, 0.0, 10.0 * k + 5, 5.0] for k in range(30)]])
    scores = torch.linspace(0.1, 0.9, 30)[None]
    keep = run_nms(boxes, scores, torch.zeros(1, 30, dtype=torch.int32), max_output=5)
    assert keep[0].tolist() == [29, 28, 27, 26, 25]
