"""The multi-task loss of Mask R-CNN: L = L_rpn + L_cls + L_box + L_mask (section 3).

torchvision computes it inside the modules' ``forward`` and requires a mask for every instance. Here
it is computed with the same modules, so that an instance that has only a box trains the RPN and the
box branch, while the mask branch learns from the others.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss

from maskcast.builder.training.pooling import pool_regions

Target = dict[str, Tensor]


def compute_losses(network: Any, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    """Compute the losses of a batch; their sum is minimised.

    Args:
        network: from ``build_network``, in training mode.
        images: each float ``[3, H, W]``, RGB in 0..1, in its final size.
        targets: per image ``boxes`` float ``[N, 4]`` (xyxy pixels), ``labels`` int64 ``[N]`` (from
            1) and, if there are any, ``masks`` uint8 ``[N, H, W]``, 0 or 1; an empty mask counts as
            absent.

    Returns:
        Scalars ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_regression`` and, for a
        network with masks, ``mask``; ``mask`` is 0 if no instance of the batch has one.
    """
    transform, heads = network.transform, network.roi_heads
    padded = transform.batch_images([transform.normalize(image) for image in images])
    padded = padded.to(memory_format=torch.channels_last)
    batch = ImageList(padded, [(image.shape[1], image.shape[2]) for image in images])
    features = network.backbone(batch.tensors)
    proposals, rpn = network.rpn(batch, features, targets)

    # select_training_samples requires the key but does not read the masks.
    keyed = [{**target, "masks": target.get("masks", target["labels"])} for target in targets]
    rois, matches, labels, regression = heads.select_training_samples(proposals, keyed)
    regions = pool_regions(heads.box_roi_pool, features, rois, batch.image_sizes)
    pooled = heads.box_head(regions)
    class_logits, box_regression = heads.box_predictor(pooled)
    box_class, box_loss = fastrcnn_loss(
        class_logits.float(), box_regression.float(), labels, regression
    )
    losses = {
        "rpn_objectness": rpn["loss_objectness"],
        "rpn_box": rpn["loss_rpn_box_reg"],
        "box_class": box_class,
        "box_regression": box_loss,
    }
    if heads.has_mask():
        losses["mask"] = _mask_loss(heads, features, rois, matches, labels, targets, batch)
    return losses


def _mask_loss(
    heads: Any,
    features: dict[str, Tensor],
    rois: list[Tensor],
    matches: list[Tensor],
    labels: list[Tensor],
    targets: list[Target],
    batch: Any,
) -> Tensor:
    """Average the binary cross-entropy over the positive RoIs of instances that have a mask."""
    positives = {}
    for i, target in enumerate(targets):
        positive = labels[i] > 0
        if "masks" in target and bool(positive.any()):
            has_mask = target["masks"].flatten(1).any(1) > 0
            positive = positive & has_mask[matches[i]]
            if bool(positive.any()):
                positives[i] = positive
    if not positives:
        return features["0"].new_zeros((), dtype=torch.float32)
    chosen, positive_of = list(positives), list(positives.values())
    boxes = [rois[i][p] for i, p in zip(chosen, positive_of, strict=True)]
    sizes = [batch.image_sizes[i] for i in chosen]
    of_chosen = {name: level[chosen] for name, level in features.items()}
    pooled = pool_regions(heads.mask_roi_pool, of_chosen, boxes, sizes)
    logits = heads.mask_predictor(heads.mask_head(pooled))
    loss: Tensor = maskrcnn_loss(
        logits.float(),
        boxes,
        [targets[i]["masks"] for i in chosen],
        [targets[i]["labels"] for i in chosen],
        [matches[i][p] for i, p in zip(chosen, positive_of, strict=True)],
    )
    return loss
