import msgspec
import numpy as np
import pytest
import torch
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.ops import MultiScaleRoIAlign, roi_align

from maskcast.builder.network.network import (
    PRESETS,
    ExactAnchorGenerator,
    NetworkConfig,
    build_network,
    freeze_all_but_keypoints,
    network_config,
)
from maskcast.builder.network.roi_align import AlignedMultiScaleRoIAlign
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints

COCO_LABELS = tuple(f"class {i}" for i in range(1, 91))


@pytest.mark.parametrize(
    ("preset", "branches", "original"),
    [
        ("resnet50-fpn", {}, maskrcnn_resnet50_fpn),
        ("resnet50-fpn", {"with_masks": False}, fasterrcnn_resnet50_fpn),
        ("resnet50-fpn-v2", {}, maskrcnn_resnet50_fpn_v2),
        (
            "resnet50-fpn",
            {"with_masks": False, "keypoints": COCO_PERSON},
            keypointrcnn_resnet50_fpn,
        ),
    ],
)
def test_a_resnet_preset_is_torchvisions_network(preset, branches, original) -> None:
    theirs = original(weights=None, weights_backbone=None).eval()
    if preset == "resnet50-fpn":
        # Without weights torchvision builds trainable norms; its checkpoints are of frozen ones.
        state = {k: v for k, v in theirs.state_dict().items() if "num_batches_tracked" not in k}
    else:
        state = theirs.state_dict()
    labels = ("person",) if "keypoints" in branches else COCO_LABELS
    ours = build_network(network_config(preset, labels, **branches)).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    ours.load_state_dict(state)
    for network in (ours, theirs):
        network.transform.min_size, network.transform.max_size = (96,), 128
        network.roi_heads.score_thresh = 0.0
        network.roi_heads.detections_per_img = 5
        # Of 1000 regions with all their classes NMS would take longer than the network.
        network.rpn._post_nms_top_n = {"training": 50, "testing": 50}
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = theirs([image])[0], ours([image])[0]
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_msgpack(preset: str) -> None:
    config = network_config(preset, ("a", "b"), with_masks=False, keypoints=COCO_PERSON)
    assert msgspec.convert(msgspec.to_builtins(config), NetworkConfig) == config


@pytest.mark.parametrize("preset", ["lite0-fpn", "lite2-fpn"])
def test_a_lite_network_finds_boxes_and_masks_in_the_images_size(preset: str) -> None:
    config = network_config(preset, ("person",))
    network = build_network(msgspec.structs.replace(config, score_threshold=0.0)).eval()
    with torch.inference_mode():
        found = network([torch.rand(3, 60, 100)])[0]
    assert 0 < len(found["boxes"]) <= config.detections_per_image
    assert found["masks"].shape == (len(found["boxes"]), 1, 60, 100)
    assert set(found["labels"].tolist()) == {1}


def test_a_mask_r_cnn_may_have_a_keypoint_branch_too() -> None:
    config = network_config("lite0-fpn", ("person",), keypoints=Keypoints(("head", "tail")))
    network = build_network(msgspec.structs.replace(config, score_threshold=0.0)).eval()
    with torch.inference_mode():
        found = network([torch.rand(3, 60, 100)])[0]
    assert found["masks"].shape == (len(found["boxes"]), 1, 60, 100)
    assert found["keypoints"].shape == (len(found["boxes"]), 2, 3)


def test_freezing_leaves_only_the_keypoint_branch_trainable() -> None:
    network = build_network(network_config("lite0-fpn", ("person",), keypoints=COCO_PERSON))
    freeze_all_but_keypoints(network)
    trainable = [name for name, value in network.named_parameters() if value.requires_grad]
    assert len(trainable) == 18
    assert all("keypoint_head" in name or "keypoint_predictor" in name for name in trainable)


def test_an_unknown_preset_is_an_input_error_that_lists_the_presets() -> None:
    with pytest.raises(InputError, match="lite0-fpn"):
        network_config("resnet18", ("person",))


def test_aligned_roi_align_shifts_by_half_a_pixel_of_each_level() -> None:
    features = {str(i): torch.rand(2, 3, 64 >> i, 64 >> i) for i in range(4)}
    boxes = [torch.tensor([[10.0, 20.0, 90.0, 60.0]]), torch.tensor([[0.0, 0.0, 250.0, 250.0]])]
    sizes = [(256, 256)] * 2
    aligned = AlignedMultiScaleRoIAlign(list("0123"), 7, 2)(features, boxes, sizes)
    # The first box, smaller than 112, is of P2; the second, 250, is of P4.
    for image, level in ((0, 0), (1, 2)):
        expected = roi_align(
            features[str(level)][image : image + 1],
            [boxes[image]],
            7,
            1 / (4 << level),
            2,
            aligned=True,
        )
        torch.testing.assert_close(aligned[image : image + 1], expected)
    plain = MultiScaleRoIAlign(list("0123"), 7, 2)(features, boxes, sizes)
    assert not torch.allclose(plain, aligned)


def test_the_configuration_reaches_the_modules() -> None:
    network = build_network(
        NetworkConfig(
            labels=("a",),
            roi_align_aligned=True,
            anchors_rounded=False,
            stride_in_1x1=True,
            frozen_norm_epsilon=0.0,
        )
    )
    assert isinstance(network.roi_heads.box_roi_pool, AlignedMultiScaleRoIAlign)
    assert isinstance(network.roi_heads.mask_roi_pool, AlignedMultiScaleRoIAlign)
    first = network.backbone.body.layer2[0]
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
    assert first.bn1.eps == 0.0
    anchors = network.rpn.anchor_generator
    assert isinstance(anchors, ExactAnchorGenerator)
    sides = anchors.cell_anchors[0][:, 2:] - anchors.cell_anchors[0][:, :2]
    np.testing.assert_allclose(sides.prod(dim=1), 32**2, rtol=1e-5)
    np.testing.assert_allclose(sides[:, 1] / sides[:, 0], [0.5, 1.0, 2.0], rtol=1e-5)
