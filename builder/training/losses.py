"""The multi-task loss of Mask R-CNN: L_rpn + L_cls + L_box + L_mask (section 3) + L_keypoint (5).

torchvision computes it inside the modules' ``forward`` and requires a mask for every instance. Here
it is computed with the same modules, so that an instance that has only a box trains the RPN and the
box branch, while the mask branch learns from the others.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    fastrcnn_loss,
    keypointrcnn_loss,
    maskrcnn_loss,
)

from maskcast.builder.training.pooling import pool_regions

Target = dict[str, Tensor]

_MAX_POSED, _COPIES = 16, 2
"""Maximum number of instances per image in ``compute_keypoint_loss``, and boxes for each."""
_JITTER = 0.06
"""Standard deviation of a side of those boxes, relative to the box: an IoU of 0.8."""


def compute_losses(
    network: Any,
    images: list[Tensor],
    targets: list[Target],
    branch_batch_size: int | None = None,
    keypoint_spread: float | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of a batch; their sum is minimised.

    Args:
        network: from ``build_network``, in training mode.
        images: each float ``[3, H, W]``, RGB in 0..1, in its final size.
        targets: per image ``boxes`` float ``[N, 4]`` (xyxy pixels), ``labels`` int64 ``[N]`` (from
            1) and, if there are any, ``masks`` uint8 ``[N, H, W]``, 0 or 1; an empty mask counts as
            absent; and ``keypoints`` float ``[N, K, 3]``, x and y pixels, above 0 if known.
        branch_batch_size: maximum number of RoIs per image in the losses ``mask`` and ``keypoint``,
            chosen at random; those of the latter lie near the instances' boxes. None takes all
            positive proposals, as torchvision does.
        keypoint_spread: as in ``Recipe``.

    Returns:
        Scalars ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_regression`` and, for a
        network with them, ``mask`` and ``keypoint``; 0 if no instance of the batch has one.
    """
    heads = network.roi_heads
    batch = _batch(network, images)
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
        some = [_sample(label, branch_batch_size) for label in labels]
        losses["mask"] = _mask_loss(heads, features, rois, matches, some, targets, batch)
    if heads.has_keypoint():
        if branch_batch_size is not None:
            sizes = batch.image_sizes
            rois, matches, labels = _regions_of_poses(targets, sizes, branch_batch_size, copies=1)
        losses["keypoint"] = _keypoint_loss(
            heads, features, rois, matches, labels, targets, batch, keypoint_spread
        )
    return losses


def compute_keypoint_loss(
    network: Any,
    images: list[Tensor],
    targets: list[Target],
    keypoint_spread: float | None = None,
) -> dict[str, Tensor]:
    """Compute the loss of the keypoint branch alone; no other part of the network gets a gradient.

    Instead of proposals it uses the instances' boxes, moved at random by a typical detection error.

    Args:
        network: as for ``compute_losses``, in evaluation mode.
        images: likewise.
        targets: likewise; masks are not read.
        keypoint_spread: as in ``Recipe``.

    Returns:
        ``keypoint``; 0 if no instance of the batch has a known keypoint.
    """
    heads = network.roi_heads
    with torch.no_grad():
        batch = _batch(network, images)
        features = network.backbone(batch.tensors)
    regions = _regions_of_poses(targets, batch.image_sizes, _MAX_POSED, _COPIES)
    loss = _keypoint_loss(heads, features, *regions, targets, batch, keypoint_spread)
    # Without a keypoint there is no gradient, but the optimizer needs one.
    bias = heads.keypoint_predictor.kps_score_lowres.bias
    return {"keypoint": loss + 0 * bias.sum()}


def _batch(network: Any, images: list[Tensor]) -> ImageList:
    """Normalise images and pad them to one size."""
    transform = network.transform
    padded = transform.batch_images([transform.normalize(image) for image in images])
    padded = padded.to(memory_format=torch.channels_last)
    return ImageList(padded, [(image.shape[1], image.shape[2]) for image in images])


def _regions_of_poses(
    targets: list[Target], sizes: list[tuple[int, int]], most: int, copies: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Choose instances with known keypoints, and boxes near theirs, in each image.

    Returns:
        Per image boxes ``[N, 4]``, indices of their instances ``[N]`` and labels ``[N]``, all 1.
    """
    rois, matches = [], []
    for target, size in zip(targets, sizes, strict=True):
        known = torch.nonzero(_has_keypoints(target)).flatten()
        some = known[torch.randperm(len(known), device=known.device)[:most]]
        matches.append(some.repeat(copies))
        rois.append(_jitter(target["boxes"][matches[-1]], size))
    return rois, matches, [torch.ones_like(match) for match in matches]


def _jitter(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Move each side of boxes ``[N, 4]`` at random, within an image of a height and width."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    moved = boxes + torch.randn_like(boxes) * _JITTER * sides
    return torch.minimum(moved.clamp(min=0), limit)


def _has_keypoints(target: Target) -> Tensor:
    """Return which instances ``[N]`` have a known keypoint."""
    known: Tensor = (target["keypoints"][..., 2] > 0).any(1)
    return known


def _sample(labels: Tensor, count: int | None) -> Tensor:
    """Keep up to ``count`` positive labels ``[N]`` of an image, chosen at random; 0 the others."""
    if count is None:
        return labels
    positives = torch.nonzero(labels > 0).flatten()
    left_out = positives[torch.randperm(len(positives), device=labels.device)[count:]]
    return labels.index_fill(0, left_out, 0)


def _positives(
    labels: list[Tensor], matches: list[Tensor], usable: list[Tensor | None]
) -> dict[int, Tensor]:
    """Select the positive RoIs of usable instances, in the images that have any."""
    positives = {}
    for i, (label, match, instances) in enumerate(zip(labels, matches, usable, strict=True)):
        positive = label > 0
        if instances is not None and bool(positive.any()):
            positive = positive & instances[match]
            if bool(positive.any()):
                positives[i] = positive
    return positives


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
    has_mask = [t["masks"].flatten(1).any(1) > 0 if "masks" in t else None for t in targets]
    positives = _positives(labels, matches, has_mask)
    if not positives:
        return features["0"].new_zeros((), dtype=torch.float32)
    pooled, boxes = _pool(heads.mask_roi_pool, features, rois, positives, batch)
    logits = heads.mask_predictor(heads.mask_head(pooled))
    loss: Tensor = maskrcnn_loss(
        logits.float(),
        boxes,
        [targets[i]["masks"] for i in positives],
        [targets[i]["labels"] for i in positives],
        [matches[i][positive] for i, positive in positives.items()],
    )
    return loss


def _keypoint_loss(
    heads: Any,
    features: dict[str, Tensor],
    rois: list[Tensor],
    matches: list[Tensor],
    labels: list[Tensor],
    targets: list[Target],
    batch: Any,
    spread: float | None,
) -> Tensor:
    """Average the cross-entropy over the known keypoints in the positive RoIs (section 5)."""
    posed = [_has_keypoints(t) if "keypoints" in t else None for t in targets]
    positives = _positives(labels, matches, posed)
    if not positives:
        return features["0"].new_zeros((), dtype=torch.float32)
    pooled, boxes = _pool(heads.keypoint_roi_pool, features, rois, positives, batch)
    logits = heads.keypoint_predictor(heads.keypoint_head(pooled))
    keypoints = [targets[i]["keypoints"] for i in positives]
    indices = [matches[i][positive] for i, positive in positives.items()]
    if spread is not None:
        points = torch.cat([k[index] for k, index in zip(keypoints, indices, strict=True)])
        return _spread_loss(logits.float(), torch.cat(boxes), points, spread)
    loss: Tensor = keypointrcnn_loss(logits.float().contiguous(), boxes, keypoints, indices)
    return loss


def _spread_loss(logits: Tensor, boxes: Tensor, points: Tensor, spread: float) -> Tensor:
    """Average the cross-entropy with normal distributions around the known keypoints.

    Args:
        logits: ``[N, K, S, S]``.
        boxes: ``[N, 4]``, which the heatmaps cover.
        points: ``[N, K, 3]``.
        spread: standard deviation, cells.
    """
    side = logits.shape[-1]
    sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
    # The middle of the first cell is at 0.
    cells = (points[..., :2] - boxes[:, None, :2]) / sides * side - 0.5
    is_inside = ((cells > -0.5) & (cells < side - 0.5)).all(2) & (points[..., 2] > 0)
    chosen, cells = logits[is_inside], cells[is_inside]
    distances = torch.arange(side, device=logits.device) - cells[..., None]
    x, y = torch.exp(-0.5 * (distances / spread) ** 2).unbind(1)
    target = y[:, :, None] * x[:, None]
    target = (target / target.sum((1, 2), keepdim=True)).flatten(1)
    if not len(target):
        return logits.sum() * 0
    return torch.nn.functional.cross_entropy(chosen.flatten(1), target)


def _pool(
    pooler: Any,
    features: dict[str, Tensor],
    rois: list[Tensor],
    positives: dict[int, Tensor],
    batch: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Pool the chosen RoIs of the chosen images; also returns those, per image."""
    boxes = [rois[i][positive] for i, positive in positives.items()]
    sizes = [batch.image_sizes[i] for i in positives]
    of_chosen = {name: level[list(positives)] for name, level in features.items()}
    return pool_regions(pooler, of_chosen, boxes, sizes), boxes
