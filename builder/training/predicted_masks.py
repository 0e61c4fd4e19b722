"""Masks for instances that have only a box, predicted by a trained network inside the box.

A network predicts better masks in annotated boxes than in boxes that it detects, and still better
ones from an enlarged image and its mirror image (data distillation, Radosavovic et al. 2018). Such
masks train the mask branch on images that were annotated without masks.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

from maskcast.builder.evaluation.coco import Annotation, check_size, read_annotations
from maskcast.builder.evaluation.evaluate import encode_masks, to_pixels
from maskcast.builder.training.augment import boxes_of_masks
from maskcast.engines.image_file import read_image

_LONGEST_SIDE = 640
_MAX_SIDE = 384
"""Square root of the area of a box, in pixels of the enlarged image, up to which the mask is good:
larger instances are pooled from a level of the pyramid that training on crops does not reach."""
_MIN_SIDE = 16
"""Minimum shorter side of a box, in pixels of the image."""
_MIN_FILL = 0.7
"""Minimum IoU of the box around the mask with the given box: the mask should touch all sides."""
_MIN_CERTAINTY = 0.7
"""Minimum mean probability inside the mask."""
_MIN_KEYPOINTS = 0.8
"""Minimum share of the visible keypoints that lie in the mask."""


@torch.inference_mode()
def predict_masks(
    network: Any, images: Path, annotations: Path, output: Path, labels: tuple[str, ...]
) -> tuple[int, int]:
    """Copy an annotation file and add the predicted masks that are credible.

    A mask is kept if its box is neither too small nor too large, if it fills the box, if the
    network is certain of it and, where the annotation has COCO's keypoints, if the visible ones lie
    inside.

    Args:
        network: from ``build_network``, with masks.
        images: folder of the images.
        annotations: COCO's JSON, with boxes.
        output: the file to write.
        labels: the network's label names.

    Returns:
        The number of instances with a mask, and the number of instances.

    Raises:
        InputError: the annotations or an image cannot be read.
    """
    content = read_annotations(annotations)
    label_of_name = {name: label for label, name in enumerate(labels, start=1)}
    label_of_category = {c["id"]: label_of_name.get(str(c["name"])) for c in content["categories"]}
    of_image: defaultdict[Any, list[Annotation]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
        if label_of_category.get(annotation["category_id"]) and not annotation.get("iscrowd"):
            of_image[annotation["image_id"]].append(annotation)
    network.eval()
    kept = 0
    for entry in content["images"]:
        scale = _LONGEST_SIDE / max(entry["height"], entry["width"])
        instances = [a for a in of_image[entry["id"]] if _has_useful_size(a["bbox"], scale)]
        if not instances:
            continue
        image = read_image(images / entry["file_name"])
        check_size(image, entry, annotations)
        boxes = torch.tensor([a["bbox"] for a in instances], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([label_of_category[a["category_id"]] for a in instances])
        crops = _predict(network, image, boxes, classes)
        pasted = paste_masks_in_image(crops, boxes, image.shape[:2])[:, 0].numpy()
        masks = pasted > 0.5
        fills = box_iou(torch.from_numpy(boxes_of_masks(masks)), boxes).diagonal().tolist()
        rles = encode_masks(masks)
        for annotation, rle, fill, mask, probability in zip(
            instances, rles, fills, masks, pasted, strict=True
        ):
            if (
                fill >= _MIN_FILL
                and probability[mask].mean() >= _MIN_CERTAINTY
                and _holds_keypoints(mask, annotation)
            ):
                annotation["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
                kept += 1
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(output)
    return kept, sum(len(instances) for instances in of_image.values())


def _predict(network: Any, image: npt.NDArray[np.uint8], boxes: Tensor, classes: Tensor) -> Tensor:
    """Return mask probabilities float ``[N, 1, M, M]``, averaged over the image and its mirror."""
    pixels = to_pixels(image).to(next(network.parameters()).device)
    boxes, width = boxes.to(pixels.device), pixels.shape[2]
    mirrored = boxes.clone()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
    straight = _forward(network, pixels, boxes, classes)
    mirror = _forward(network, pixels.flip(2), mirrored, classes).flip(3)
    return ((straight + mirror) / 2).cpu()


def _forward(network: Any, pixels: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    scale = _LONGEST_SIDE / max(pixels.shape[1:])
    size = [round(side * scale) for side in pixels.shape[1:]]
    resized = torch.nn.functional.interpolate(
        pixels[None], size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    transform, heads = network.transform, network.roi_heads
    batch = transform.batch_images([transform.normalize(resized)])
    features = network.backbone(batch)
    ratio = boxes.new_tensor([size[1] / pixels.shape[2], size[0] / pixels.shape[1]] * 2)
    pooled = heads.mask_roi_pool(features, [boxes * ratio], [(size[0], size[1])])
    logits = heads.mask_predictor(heads.mask_head(pooled))
    return torch.sigmoid(logits[torch.arange(len(boxes)), classes][:, None].float())


def _has_useful_size(box: list[float], scale: float) -> bool:
    """Check a box, x, y, width and height in pixels of an image that is enlarged by ``scale``."""
    _, _, width, height = box
    is_learnable = min(width, height) >= _MIN_SIDE
    return is_learnable and math.sqrt(width * height) * scale <= _MAX_SIDE


def _holds_keypoints(mask: npt.NDArray[np.bool_], annotation: Annotation) -> bool:
    """Return whether most of the visible keypoints, if any are known, lie in a mask ``[H, W]``."""
    points = np.array(annotation.get("keypoints") or [], np.float32).reshape(-1, 3)
    visible = points[points[:, 2] == 2, :2].astype(np.int64)
    if not len(visible):
        return True
    height, width = mask.shape
    hits = mask[visible[:, 1].clip(0, height - 1), visible[:, 0].clip(0, width - 1)]
    return bool(hits.mean() >= _MIN_KEYPOINTS)
