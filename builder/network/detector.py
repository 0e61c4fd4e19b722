"""The graphs of a bundle as torch modules: detector, segmenter and poser of a torchvision R-CNN.

They compute what ``torchvision.models.detection`` computes, with tensors of fixed size in place of
lists, so that they can be exported. They use the model's own modules, under the same names.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskcast.builder.graph.operators import grouped_nms, multiscale_roi_align
from maskcast.engines.errors import InputError

# A finite score below every threshold marks a place without a box.
_ABSENT = -1.0


class Detector(nn.Module):
    """Map images to the best detections and to the features that masks are computed from.

    Args:
        model: torchvision's FasterRCNN or MaskRCNN over a pyramid with the strides 4, 8, 16, 32
            and 64.
        candidates: maximum number of (region, class) pairs of an image that enter the last NMS,
            best first. torchvision has no limit; the result is the same unless more than
            ``candidates - box_detections_per_img`` of them are suppressed by better ones.

    Raises:
        InputError: the model has another pyramid.
    """

    def __init__(self, model: Any, candidates: int = 1000) -> None:
        super().__init__()
        levels = len(model.rpn.anchor_generator.sizes)
        if model.roi_heads.box_roi_pool.featmap_names != ["0", "1", "2", "3"] or levels != 5:
            raise InputError(
                "the network does not have the pyramid levels P2 to P5 (strides 4, 8, 16, 32); use "
                "one with a ResNet-FPN or EfficientNet-Lite-FPN backbone"
            )
        self.backbone = model.backbone
        self.rpn: Any = nn.ModuleDict({"head": model.rpn.head})
        heads = model.roi_heads
        self.roi_heads: Any = nn.ModuleDict(
            {"box_head": heads.box_head, "box_predictor": heads.box_predictor}
        )
        self.pooling = _pooling_arguments(heads.box_roi_pool)
        self._mean, self._std = model.transform.image_mean, model.transform.image_std
        anchors = model.rpn.anchor_generator
        anchors.set_cell_anchors(torch.float32, torch.device("cpu"))
        for level, cell in enumerate(anchors.cell_anchors):
            self.register_buffer(f"anchors_{level}", cell.clone(), persistent=False)
        # The settings for inference, whatever mode the model is in.
        self._rpn_top_n = model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"]
        self._rpn_iou, self._rpn_min_score = model.rpn.nms_thresh, model.rpn.score_thresh
        self._rpn_min_size, self._rpn_coder = model.rpn.min_size, model.rpn.box_coder
        self._box_iou, self._box_min_score = heads.nms_thresh, heads.score_thresh
        self._box_coder, self._detections = heads.box_coder, heads.detections_per_img
        self._candidates = candidates

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the detector.

        Args:
            images: float32 ``[B, 3, H, W]``, RGB in 0..255; H and W are multiples of 32.
            sizes: float32 ``[B, 2]``, height and width of the content at the top left; the rest
                is padding, whatever its value.

        Returns:
            boxes ``[B, D, 4]`` in input pixels, best first, clipped to the content; scores
            ``[B, D]``; labels int64 ``[B, D]`` (unused places: zeros); counts int64 ``[B]``; the
            features P2, P3, P4, P5.
        """
        features = list(self.backbone(self._normalise(images, sizes)).values())
        proposals = self._propose(features, images.shape[-2:], sizes)
        boxes, scores, labels, counts = self._classify(features[:4], *proposals, sizes)
        return boxes, scores, labels, counts, *features[:4]

    def _normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """GeneralizedRCNNTransform: zero mean, unit variance, and zeros for padding."""
        mean = torch.tensor(self._mean)[:, None, None]
        std = torch.tensor(self._std)[:, None, None]
        normal = (images / 255 - mean) / std
        rows = torch.arange(images.shape[2])[:, None] < sizes[:, 0, None, None, None]
        columns = torch.arange(images.shape[3]) < sizes[:, 1, None, None, None]
        return torch.where(rows & columns, normal, 0.0)

    def _propose(
        self, features: list[Tensor], size: torch.Size, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """RegionProposalNetwork.filter_proposals: regions ``[B, P, 4]``, and which exist."""
        objectness, deltas = self.rpn["head"](features)
        top_n, post_nms_top_n = self._rpn_top_n
        logits, regions, levels = [], [], []
        for level, (logit, delta) in enumerate(zip(objectness, deltas, strict=True)):
            _, per_cell, height, width = logit.shape
            logit = logit.permute(0, 2, 3, 1).flatten(1)
            delta = delta.unflatten(1, (per_cell, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            anchors = self._anchors(level, (height, width), size)
            best, index = logit.topk(torch.sym_min(top_n, height * width * per_cell), dim=1)
            logits.append(best)
            anchors = F.embedding(index, anchors)
            regions.append(_decode(self._rpn_coder, _rows(delta, index), anchors))
            levels.append(torch.full_like(index, level, dtype=torch.int32))
        boxes = _clip(torch.cat(regions, dim=1), sizes)
        scores = torch.cat(logits, dim=1).sigmoid()
        usable = _is_larger(boxes, self._rpn_min_size) & (scores >= self._rpn_min_score)
        keep = grouped_nms(
            boxes,
            torch.where(usable, scores, _ABSENT),
            torch.cat(levels, dim=1),
            self._rpn_iou,
            _ABSENT,
            post_nms_top_n,
        )
        exists = keep >= 0
        return torch.where(exists[..., None], _rows(boxes, keep.clamp(min=0)), 0.0), exists

    def _anchors(self, level: int, grid: tuple[int, int], size: torch.Size) -> Tensor:
        """AnchorGenerator.grid_anchors: ``[h * w * A, 4]``, in the order of the head's outputs."""
        cell = self.get_buffer(f"anchors_{level}")
        y = torch.arange(grid[0]) * (size[0] // grid[0])
        x = torch.arange(grid[1]) * (size[1] // grid[1])
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack([columns, rows, columns, rows], dim=-1).to(cell.dtype)
        return (corners[:, :, None] + cell).flatten(0, 2)

    def _classify(
        self, features: list[Tensor], regions: Tensor, exists: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the box branch and RoIHeads.postprocess_detections."""
        batch, count = exists.shape
        images = torch.arange(batch, dtype=torch.int32)[:, None].expand(batch, count)
        pooled = multiscale_roi_align(
            *features, regions.flatten(0, 1), images.flatten(), *self.pooling
        )
        logits, deltas = self.roi_heads["box_predictor"](self.roi_heads["box_head"](pooled))
        classes = logits.shape[1]  # the background is class 0
        scores = F.softmax(logits, dim=-1)[:, 1:].reshape(batch, count, classes - 1)
        scores = torch.where(exists[..., None], scores, _ABSENT).flatten(1)
        best, index = scores.topk(min(self._candidates, count * (classes - 1)), dim=1)
        region = index // (classes - 1)
        label = index % (classes - 1) + 1
        deltas = deltas.reshape(batch, count * classes, 4)
        delta = _rows(deltas, region * classes + label)
        boxes = _clip(_decode(self._box_coder, delta, _rows(regions, region)), sizes)
        keep = grouped_nms(
            boxes,
            torch.where(_is_larger(boxes, 1e-2), best, _ABSENT),
            label.to(torch.int32),
            self._box_iou,
            self._box_min_score,
            self._detections,
        )
        found = keep >= 0
        keep = keep.clamp(min=0).long()
        return (
            torch.where(found[..., None], _rows(boxes, keep), 0.0),
            torch.where(found, best.gather(1, keep), 0.0),
            torch.where(found, label.gather(1, keep), 0),
            found.sum(dim=1),
        )


class Segmenter(nn.Module):
    """Map detections to mask crops of their own class.

    Args:
        model: torchvision's MaskRCNN.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        heads = model.roi_heads
        self.roi_heads: Any = nn.ModuleDict(
            {"mask_head": heads.mask_head, "mask_predictor": heads.mask_predictor}
        )
        self.pooling = _pooling_arguments(heads.mask_roi_pool)

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        boxes: Tensor,
        labels: Tensor,
        batch_index: Tensor,
    ) -> Tensor:
        """Run the mask branch and torchvision's ``maskrcnn_inference``.

        Args:
            p2: the detector's features at stride 4.
            p3: at stride 8.
            p4: at stride 16.
            p5: at stride 32.
            boxes: float32 ``[R, 4]``, xyxy in pixels of the network's input.
            labels: int64 ``[R]``.
            batch_index: int32 ``[R]``, which image each box lies in.

        Returns:
            float32 ``[R, 28, 28]``, probabilities.
        """
        pooled = multiscale_roi_align(p2, p3, p4, p5, boxes, batch_index, *self.pooling)
        predictor = self.roi_heads["mask_predictor"]
        x = F.relu(predictor.conv5_mask(self.roi_heads["mask_head"](pooled)))
        # The last layer is a 1x1 convolution with one channel per class: a product with one row of
        # its weights per box skips all other classes.
        last = predictor.mask_fcn_logits
        weight = F.embedding(labels, last.weight.flatten(1))
        bias = F.embedding(labels, last.bias[:, None])
        logits = torch.bmm(weight[:, None], x.flatten(2))[:, 0] + bias
        return logits.sigmoid().reshape(-1, *x.shape[2:])


class Poser(nn.Module):
    """Map detections to keypoint heatmaps.

    Args:
        model: a network with torchvision's keypoint branch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        heads = model.roi_heads
        self.roi_heads: Any = nn.ModuleDict(
            {"keypoint_head": heads.keypoint_head, "keypoint_predictor": heads.keypoint_predictor}
        )
        self.pooling = _pooling_arguments(heads.keypoint_roi_pool)

    def forward(
        self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, batch_index: Tensor
    ) -> Tensor:
        """Run the keypoint branch.

        Args:
            p2: the detector's features at stride 4.
            p3: at stride 8.
            p4: at stride 16.
            p5: at stride 32.
            boxes: float32 ``[R, 4]``, xyxy in pixels of the network's input.
            batch_index: int32 ``[R]``, which image each box lies in.

        Returns:
            float32 ``[R, K, 56, 56]``, logits; ``decode_heatmaps`` finds the keypoints.
        """
        pooled = multiscale_roi_align(p2, p3, p4, p5, boxes, batch_index, *self.pooling)
        heatmaps: Tensor = self.roi_heads["keypoint_predictor"](
            self.roi_heads["keypoint_head"](pooled)
        )
        return heatmaps


def _pooling_arguments(pool: Any) -> tuple[int, int, bool]:
    """Output size, sampling ratio and alignment of a MultiScaleRoIAlign."""
    return pool.output_size[0], pool.sampling_ratio, getattr(pool, "aligned", False)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Take rows ``index [B, K]`` out of each image's ``table [B, N, D]``: ``[B, K, D]``."""
    first = torch.arange(table.shape[0])[:, None] * table.shape[1]
    # An embedding is exported as one plain Gather; indexing would become a GatherND.
    return F.embedding(index + first, table.flatten(0, 1))


def _decode(coder: Any, deltas: Tensor, boxes: Tensor) -> Tensor:
    """BoxCoder.decode_single for ``[..., 4]`` deltas and boxes alike."""
    low, high = boxes[..., :2], boxes[..., 2:]
    side = high - low
    weights = torch.tensor(coder.weights)
    move = deltas[..., :2] / weights[:2]
    growth = (deltas[..., 2:] / weights[2:]).clamp(max=coder.bbox_xform_clip)
    centre = move * side + (low + 0.5 * side)
    half = 0.5 * (growth.exp() * side)
    return torch.cat([centre - half, centre + half], dim=-1)


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """clip_boxes_to_image for ``boxes [B, N, 4]`` and ``sizes [B, 2]`` (height, width)."""
    limit = sizes.flip(1).repeat(1, 2)[:, None]
    return torch.minimum(boxes.clamp(min=0), limit)


def _is_larger(boxes: Tensor, min_size: float) -> Tensor:
    """remove_small_boxes: whether both sides are at least ``min_size``."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(dim=-1)
