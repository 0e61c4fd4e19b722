"""Weights of detectron2's model zoo, converted to torchvision's modules.

The conversion keeps RoIAlign with ``aligned=True``, unrounded anchors, the stride in a bottleneck's
first convolution, the pixel mean and deviation, and adapts the order of classes (detectron2 has the
background last) and of colours (BGR). Three differences remain: detectron2 resizes with Pillow's
antialiasing, samples a RoIAlign bin at each of its pixels (here 2x2), and pastes masks without
torchvision's rounding of boxes. Results are therefore close to detectron2's, not equal.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from maskcast.builder.network.network import NetworkConfig
from maskcast.engines.errors import InputError

# Pixel statistics of the caffe models that the zoo starts from: BGR, 0..255.
_PIXEL_MEAN = (103.530, 116.280, 123.675)
_PIXEL_STD = (1.0, 1.0, 1.0)

_RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", r"backbone.body.bn1."),
        (r"^backbone\.bottom_up\.stem\.conv1\.", r"backbone.body.conv1."),
        (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.", r"backbone.body.layer<\1-1>.\2."),
        (r"\.conv([123])\.norm\.", r".bn\1."),
        (r"\.shortcut\.norm\.", r".downsample.1."),
        (r"\.shortcut\.", r".downsample.0."),
        (r"^backbone\.fpn_lateral(\d)\.", r"backbone.fpn.inner_blocks.<\1-2>.0."),
        (r"^backbone\.fpn_output(\d)\.", r"backbone.fpn.layer_blocks.<\1-2>.0."),
        (r"^proposal_generator\.rpn_head\.conv\.", r"rpn.head.conv.0.0."),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", r"rpn.head.cls_logits."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", r"rpn.head.bbox_pred."),
        (r"^roi_heads\.box_head\.fc1\.", r"roi_heads.box_head.fc6."),
        (r"^roi_heads\.box_head\.fc2\.", r"roi_heads.box_head.fc7."),
        (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", r"roi_heads.mask_head.<\1-1>.0."),
        (r"^roi_heads\.mask_head\.deconv\.", r"roi_heads.mask_predictor.conv5_mask."),
        (r"^roi_heads\.mask_head\.predictor\.", r"roi_heads.mask_predictor.mask_fcn_logits."),
    ]
]
_IGNORED = re.compile(r"anchor_generator|^pixel_mean$|^pixel_std$|num_batches_tracked$")


def is_detectron2(state: dict[str, Any]) -> bool:
    """Return whether weights have detectron2's names, not torchvision's."""
    return any(key.startswith("backbone.bottom_up.") for key in state)


def convert(state: dict[str, Any]) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Convert the weights of a ResNet-FPN Mask R-CNN or Faster R-CNN.

    Args:
        state: arrays or tensors by detectron2's names.

    Returns:
        The configuration and the weights by torchvision's names.

    Raises:
        InputError: the weights are of another architecture.
    """
    try:
        tensors = {
            _rename(key): _tensor(value) for key, value in state.items() if not _IGNORED.search(key)
        }
        stem = tensors["backbone.body.conv1.weight"]
        tensors["backbone.body.conv1.weight"] = stem.flip(1).contiguous()
        _put_background_first(tensors)
        labels = _labels(len(tensors["roi_heads.box_predictor.cls_score.bias"]) - 1)
        mean = _tensor(state.get("pixel_mean", _PIXEL_MEAN)).reshape(3).flip(0).tolist()
        std = _tensor(state.get("pixel_std", _PIXEL_STD)).reshape(3).flip(0).tolist()
    except KeyError as error:
        raise InputError(
            f"not a ResNet-FPN R-CNN of detectron2, it has no {error.args[0]}"
        ) from None
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # other types and shapes
        reason = str(error).splitlines()[0]
        raise InputError(f"not a ResNet-FPN R-CNN of detectron2 ({reason})") from None
    is_resnet101 = "backbone.body.layer3.22.conv1.weight" in tensors
    config = NetworkConfig(
        labels=labels,
        with_masks="roi_heads.mask_predictor.mask_fcn_logits.weight" in tensors,
        backbone="resnet101" if is_resnet101 else "resnet50",
        stride_in_1x1=True,
        image_mean=(mean[0] / 255, mean[1] / 255, mean[2] / 255),
        image_std=(std[0] / 255, std[1] / 255, std[2] / 255),
        anchors_rounded=False,
        roi_align_aligned=True,
    )
    return config, tensors


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    # "<5-1>" is 4: torchvision counts levels and layers from another number.
    return re.sub(r"<(\d)-(\d)>", lambda m: str(int(m[1]) - int(m[2])), key)


def _put_background_first(tensors: dict[str, Tensor]) -> None:
    """Move the background from the end of the class scores to the front.

    detectron2's box and mask predictors have no background; torchvision's do, but never read it.
    """
    for kind in ("weight", "bias"):
        name = f"roi_heads.box_predictor.cls_score.{kind}"
        tensors[name] = tensors[name].roll(1, 0)
        name = f"roi_heads.box_predictor.bbox_pred.{kind}"
        tensors[name] = torch.cat([torch.zeros_like(tensors[name][:4]), tensors[name]])
        name = f"roi_heads.mask_predictor.mask_fcn_logits.{kind}"
        if name in tensors:
            tensors[name] = torch.cat([torch.zeros_like(tensors[name][:1]), tensors[name]])


def _labels(count: int) -> tuple[str, ...]:
    """Return COCO's names for 80 classes, else numbers: a checkpoint does not hold the names."""
    categories = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    names = tuple(name for name in categories if name not in ("__background__", "N/A"))
    return names if count == len(names) else tuple(f"class {i}" for i in range(1, count + 1))
