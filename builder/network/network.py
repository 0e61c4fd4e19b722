"""Mask R-CNN and Faster R-CNN: the configuration of a network, and its modules.

He et al., "Mask R-CNN" (ICCV 2017); Lin et al., "Feature Pyramid Networks" (CVPR 2017); Ren et al.,
"Faster R-CNN" (NeurIPS 2015). The modules are torchvision's, so that its checkpoints load
unchanged; a preset differs from them only where its configuration says so.
"""

from collections import OrderedDict
from functools import partial
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torchvision.models import resnet50, resnet101
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from maskcast.builder.network.backbone import EfficientNetLite
from maskcast.builder.network.roi_align import AlignedMultiScaleRoIAlign
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import HEATMAP_SIZE, Keypoints

ROI_LEVELS = ("0", "1", "2", "3")  # P2 to P5; the coarsest level, P6, serves the RPN alone


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of a network; the defaults are torchvision's ResNet-50-FPN of the paper.

    Attributes:
        labels: class names without the background; label ``i`` of a detection is ``labels[i - 1]``.
        with_masks: Mask R-CNN, or else Faster R-CNN.
        keypoints: what the keypoint branch finds in each instance; None for no such branch.
        backbone: the convolutional body.
        heads: "paper", or "v2": batch norm in FPN and heads, a two-layer RPN, a convolutional box
            head (Li et al., "Benchmarking Detection Transfer Learning", 2021).
        stride_in_1x1: a ResNet bottleneck strides in its first 1x1 convolution, as the original
            (He et al. 2016) and detectron2's checkpoints do, not in the 3x3 as torchvision's.
        frozen_norm_epsilon: added to the variance by the frozen batch norms of a ResNet.
        fpn_channels: width of every pyramid level (FPN, section 3: 256).
        min_size: the shorter side is resized to this many pixels (Mask R-CNN, section 3.1: 800).
        max_size: unless the longer side would exceed this. Equal sizes fix the longer side.
        image_mean: of RGB in 0..1, subtracted.
        image_std: of RGB in 0..1, divided by.
        anchor_sizes: square root of the anchors' area on P2 to P6, pixels (FPN, section 4.1).
        anchor_ratios: height over width.
        anchors_rounded: corners at whole pixels (torchvision), or exact (detectron2).
        rpn_pre_nms_top_n: best proposals of each level before NMS.
        rpn_post_nms_top_n: best proposals of an image after NMS (Mask R-CNN, section 3.1: 1000).
        rpn_pre_nms_top_n_train: the same in training.
        rpn_post_nms_top_n_train: the same in training (FPN, section 5.2: 2000).
        rpn_nms_threshold: IoU (Faster R-CNN, section 3.3: 0.7).
        rpn_foreground_iou: an anchor above it is positive (Faster R-CNN, section 3.1.2).
        rpn_background_iou: an anchor below it is negative.
        rpn_batch_size: anchors per image in the loss.
        rpn_positive_fraction: maximum share of positives.
        roi_align_sampling_ratio: samples per side of a RoIAlign bin (Mask R-CNN, section 3: 2x2).
        roi_align_aligned: pixel centres at half-integers (detectron2), not at integers.
        box_pool_size: side of the RoIAlign grid of the box branch.
        mask_pool_size: side of the RoIAlign grid of the mask branch; masks are twice that.
        box_head_channels: width of the box branch's linear layers.
        box_foreground_iou: a RoI above it is positive (Mask R-CNN, section 3.1: 0.5).
        box_batch_size: RoIs per image in the loss (section 3.1: 512 with FPN).
        box_positive_fraction: maximum share of positives (section 3.1: 1:3).
        score_threshold: detections below it are dropped.
        box_nms_threshold: IoU of the NMS of each class.
        detections_per_image: the best ones go to the mask branch (section 3.1: 100).
        mask_head_channels: width of the mask branch (Mask R-CNN, figure 4: 256).
        mask_head_layers: its 3x3 convolutions (figure 4: 4).
        keypoint_head_channels: width of the keypoint branch (Mask R-CNN, section 5: 512).
        keypoint_head_layers: its 3x3 convolutions (section 5: 8).
        keypoint_blur_cells: filter of the heatmaps; see ``decode_heatmaps``.
    """

    labels: tuple[str, ...]
    with_masks: bool = True
    keypoints: Keypoints | None = None
    backbone: Literal["resnet50", "resnet101", "lite0", "lite1", "lite2"] = "resnet50"
    heads: Literal["paper", "v2"] = "paper"
    stride_in_1x1: bool = False
    frozen_norm_epsilon: float = 1e-5
    fpn_channels: int = 256
    min_size: int = 800
    max_size: int = 1333
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    anchor_sizes: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchors_rounded: bool = True
    rpn_pre_nms_top_n: int = 1000
    rpn_post_nms_top_n: int = 1000
    rpn_pre_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_train: int = 2000
    rpn_nms_threshold: float = 0.7
    rpn_foreground_iou: float = 0.7
    rpn_background_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    roi_align_sampling_ratio: int = 2
    roi_align_aligned: bool = False
    box_pool_size: int = 7
    mask_pool_size: int = 14
    box_head_channels: int = 1024
    box_foreground_iou: float = 0.5
    box_batch_size: int = 512
    box_positive_fraction: float = 0.25
    score_threshold: float = 0.05
    box_nms_threshold: float = 0.5
    detections_per_image: int = 100
    mask_head_channels: int = 256
    mask_head_layers: int = 4
    keypoint_head_channels: int = 512
    keypoint_head_layers: int = 8
    keypoint_blur_cells: float = 0.0


# The real-time networks: half the width, fewer proposals, the longer side at 512.
_LITE: dict[str, Any] = {
    "fpn_channels": 128,
    "min_size": 512,
    "max_size": 512,
    "image_mean": (127 / 255,) * 3,
    "image_std": (128 / 255,) * 3,
    "anchor_sizes": (24, 48, 96, 192, 320),
    "rpn_pre_nms_top_n": 500,
    "rpn_post_nms_top_n": 300,
    "rpn_pre_nms_top_n_train": 1000,
    "rpn_post_nms_top_n_train": 500,
    "box_head_channels": 512,
    "box_batch_size": 128,
    "mask_head_channels": 128,
    "keypoint_head_channels": 96,
    "keypoint_head_layers": 8,
    "keypoint_blur_cells": 6.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "resnet50-fpn": {},
    "resnet50-fpn-v2": {"heads": "v2"},
    "resnet101-fpn": {"backbone": "resnet101"},
    "lite0-fpn": {"backbone": "lite0", **_LITE},
    "lite1-fpn": {"backbone": "lite1", **_LITE},
    "lite2-fpn": {"backbone": "lite2", **_LITE},
}


def network_config(
    preset: str,
    labels: tuple[str, ...],
    with_masks: bool = True,
    keypoints: Keypoints | None = None,
) -> NetworkConfig:
    """Return the configuration of a preset for these classes and keypoints.

    Raises:
        InputError: there is no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"network {preset!r}: no such preset; choose one of {', '.join(PRESETS)}")
    return NetworkConfig(
        labels=labels, with_masks=with_masks, keypoints=keypoints, **PRESETS[preset]
    )


class LiteBackboneWithFPN(nn.Module):
    """EfficientNet-Lite under a feature pyramid, in the form of torchvision's BackboneWithFPN."""

    def __init__(self, body: EfficientNetLite, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.out_channels, out_channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map ``[B, 3, H, W]`` to the levels "0" to "3" (strides 4 to 32) and "pool" (64)."""
        pyramid: OrderedDict[str, Tensor] = self.fpn(self.body(images))
        return pyramid


class ExactAnchorGenerator(AnchorGenerator):  # type: ignore[misc]
    """Anchors whose corners are not rounded to whole pixels, as in detectron2."""

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return ``[len(aspect_ratios) * len(scales), 4]`` boxes around the origin."""
        scale = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half_width = (scale[None, :] / root[:, None]).flatten() / 2
        half_height = (scale[None, :] * root[:, None]).flatten() / 2
        return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)


def _resnet_with_fpn(config: NetworkConfig) -> BackboneWithFPN:
    frozen_norm = partial(FrozenBatchNorm2d, eps=config.frozen_norm_epsilon)
    norm = nn.BatchNorm2d if config.heads == "v2" else frozen_norm
    body = {"resnet50": resnet50, "resnet101": resnet101}[config.backbone](norm_layer=norm)
    if config.stride_in_1x1:
        for layer in (body.layer2, body.layer3, body.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return BackboneWithFPN(
        body,
        return_layers={"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"},
        in_channels_list=[256, 512, 1024, 2048],
        out_channels=config.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=nn.BatchNorm2d if config.heads == "v2" else None,
    )


def build_network(config: NetworkConfig) -> Any:
    """Build the network with random weights.

    The keys and shapes of the ResNet presets' state are those of torchvision's
    ``maskrcnn_resnet50_fpn``, ``maskrcnn_resnet50_fpn_v2`` and their Faster R-CNN forms, and
    ``keypointrcnn_resnet50_fpn``.

    Returns:
        torchvision's MaskRCNN, or FasterRCNN without masks; either may have a keypoint branch.
    """
    channels = config.fpn_channels
    backbone: nn.Module
    if config.backbone == "resnet50" or config.backbone == "resnet101":
        backbone = _resnet_with_fpn(config)
    else:
        backbone = LiteBackboneWithFPN(EfficientNetLite(config.backbone), channels)
    num_classes = len(config.labels) + 1
    is_v2 = config.heads == "v2"
    norm = nn.BatchNorm2d if is_v2 else None
    pooler = AlignedMultiScaleRoIAlign if config.roi_align_aligned else MultiScaleRoIAlign
    anchors = AnchorGenerator if config.anchors_rounded else ExactAnchorGenerator
    side = config.box_pool_size
    arguments: dict[str, Any] = {
        "min_size": config.min_size,
        "max_size": config.max_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "rpn_anchor_generator": anchors(
            tuple((size,) for size in config.anchor_sizes),
            (config.anchor_ratios,) * len(config.anchor_sizes),
        ),
        "rpn_head": RPNHead(channels, len(config.anchor_ratios), conv_depth=2 if is_v2 else 1),
        "rpn_pre_nms_top_n_train": config.rpn_pre_nms_top_n_train,
        "rpn_pre_nms_top_n_test": config.rpn_pre_nms_top_n,
        "rpn_post_nms_top_n_train": config.rpn_post_nms_top_n_train,
        "rpn_post_nms_top_n_test": config.rpn_post_nms_top_n,
        "rpn_nms_thresh": config.rpn_nms_threshold,
        "rpn_fg_iou_thresh": config.rpn_foreground_iou,
        "rpn_bg_iou_thresh": config.rpn_background_iou,
        "rpn_batch_size_per_image": config.rpn_batch_size,
        "rpn_positive_fraction": config.rpn_positive_fraction,
        "box_roi_pool": pooler(list(ROI_LEVELS), side, config.roi_align_sampling_ratio),
        "box_head": (
            FastRCNNConvFCHead(
                (channels, side, side), [channels] * 4, [config.box_head_channels], norm_layer=norm
            )
            if is_v2
            else TwoMLPHead(channels * side**2, config.box_head_channels)
        ),
        "box_predictor": FastRCNNPredictor(config.box_head_channels, num_classes),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.box_nms_threshold,
        "box_detections_per_img": config.detections_per_image,
        "box_fg_iou_thresh": config.box_foreground_iou,
        "box_bg_iou_thresh": config.box_foreground_iou,
        "box_batch_size_per_image": config.box_batch_size,
        "box_positive_fraction": config.box_positive_fraction,
    }
    if config.with_masks:
        width = config.mask_head_channels
        predictor = MaskRCNNPredictor(width, width, num_classes)
        # torchvision's initial weights give logits in the hundreds. A standard deviation of 0.001,
        # as in the authors' code, gives probabilities of one half.
        nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
        nn.init.zeros_(predictor.mask_fcn_logits.bias)
        network = MaskRCNN(
            backbone,
            mask_roi_pool=pooler(
                list(ROI_LEVELS), config.mask_pool_size, config.roi_align_sampling_ratio
            ),
            mask_head=MaskRCNNHeads(
                channels, (width,) * config.mask_head_layers, 1, norm_layer=norm
            ),
            mask_predictor=predictor,
            **arguments,
        )
    else:
        network = FasterRCNN(backbone, **arguments)
    if config.keypoints is not None:
        _add_keypoint_branch(network.roi_heads, config, len(config.keypoints), pooler)
    return network


def _add_keypoint_branch(
    heads: Any, config: NetworkConfig, count: int, pooler: type[MultiScaleRoIAlign]
) -> None:
    """Add the modules that torchvision's KeypointRCNN has and its FasterRCNN does not."""
    width = config.keypoint_head_channels
    # A transposed convolution doubles the grid, and so does the upsampling after it.
    side = HEATMAP_SIZE // 4
    heads.keypoint_roi_pool = pooler(list(ROI_LEVELS), side, config.roi_align_sampling_ratio)
    heads.keypoint_head = KeypointRCNNHeads(
        config.fpn_channels, (width,) * config.keypoint_head_layers
    )
    heads.keypoint_predictor = KeypointRCNNPredictor(width, count)
    # Start from flat heatmaps, as the authors' code does.
    nn.init.normal_(heads.keypoint_predictor.kps_score_lowres.weight, std=0.001)


def freeze_all_but_keypoints(network: Any) -> None:
    """Freeze every parameter outside the keypoint branch."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("roi_heads.keypoint_"))
