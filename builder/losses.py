"""The multi-task loss of Mask R-CNN: L = L_rpn + L_cls + L_box + L_mask (section 3).

torchvision computes it inside the modules' ``forward`` and demands a mask of every instance. Here
it is written out over the same modules, so that an instance with a box alone can train the RPN and
the box branch while the mask branch learns from the others.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss

from builder.pooling import pool_regions

Target = dict[str, Tensor]


def compute_losses(
    network: Any, images: list[Tensor], targets: list[Target], *, score_is_quality: bool = False
) -> dict[str, Tensor]:
    """Compute the losses of a batch; their sum is what is minimised.

    Args:
        network: from ``build_network``, in training mode.
        images: each float ``[3, H, W]``, RGB in 0..1, of its final size: nothing is resized.
        targets: per image ``boxes`` float ``[N, 4]`` (xyxy pixels), ``labels`` int64 ``[N]`` (from
            1) and, where the annotation has them, ``masks`` uint8 ``[N, H, W]``, 0 or 1; an empty
            mask is none.
        score_is_quality: a positive RoI's class is learnt as far as its box fits: its target is
            the IoU of the box that comes out of it, the rest is background. Scores then rank
            boxes by how well they fit (as quality focal loss does; Li et al. 2020, section 3.1).

    Returns:
        Scalars ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_regression`` and, for a
        network with masks, ``mask``; the last is 0 where no instance of the batch has a mask.
    """
    transform, heads = network.transform, network.roi_heads
    padded = transform.batch_images([transform.normalize(image) for image in images])
    padded = padded.to(memory_format=torch.channels_last)
    batch = ImageList(padded, [(image.shape[1], image.shape[2]) for image in images])
    features = network.backbone(batch.tensors)
    proposals, rpn = network.rpn(batch, features, targets)

    # select_training_samples wants the key, though it never looks at the masks.
    keyed = [{**target, "masks": target.get("masks", target["labels"])} for target in targets]
    rois, matches, labels, regression = heads.select_training_samples(proposals, keyed)
    regions = pool_regions(heads.box_roi_pool, features, rois, batch.image_sizes)
    pooled = heads.box_head(regions)
    class_logits, box_regression = heads.box_predictor(pooled)
    box_class, box_loss = fastrcnn_loss(
        class_logits.float(), box_regression.float(), labels, regression
    )
    if score_is_quality:
        fit = _box_fit(heads, box_regression.detach().float(), rois, matches, labels, targets)
        box_class = _quality_loss(class_logits.float(), torch.cat(labels), fit)
    losses = {
        "rpn_objectness": rpn["loss_objectness"],
        "rpn_box": rpn["loss_rpn_box_reg"],
        "box_class": box_class,
        "box_regression": box_loss,
    }
    if heads.has_mask():
        losses["mask"] = _mask_loss(heads, features, rois, matches, labels, targets, batch)
    return losses


def _box_fit(
    heads: Any,
    box_regression: Tensor,
    rois: list[Tensor],
    matches: list[Tensor],
    labels: list[Tensor],
    targets: list[Target],
) -> Tensor:
    """IoU ``[R]`` of the box that each RoI becomes with its instance; 0 for the background."""
    boxes = heads.box_coder.decode(box_regression, rois)  # [R, classes, 4]
    of_class = boxes[torch.arange(len(boxes)), torch.cat(labels)]
    truth = torch.cat(
        [
            target["boxes"][match] if len(target["boxes"]) else torch.zeros_like(roi)
            for target, match, roi in zip(targets, matches, rois, strict=True)
        ]
    )
    low, high = (
        torch.maximum(of_class[:, :2], truth[:, :2]),
        torch.minimum(of_class[:, 2:], truth[:, 2:]),
    )
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = sum((b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) for b in (of_class, truth))
    fit: Tensor = shared / (areas - shared).clamp(min=1e-6)
    return torch.where(torch.cat(labels) > 0, fit, torch.zeros_like(fit))


def _quality_loss(class_logits: Tensor, labels: Tensor, fit: Tensor) -> Tensor:
    """Cross-entropy with a target of ``fit`` for the class and the rest for the background."""
    logarithms = class_logits.log_softmax(dim=1)
    of_class = logarithms.gather(1, labels[:, None])[:, 0]
    return -(fit * of_class + (1 - fit) * logarithms[:, 0]).mean()


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
