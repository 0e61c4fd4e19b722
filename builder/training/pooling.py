"""RoIAlign for training on a CPU: the same values as torchvision's, many times faster.

torchvision's backward pass on a CPU adds single values on one thread. Here pooling is one sparse
product with a table of the cells of all levels: each bin is a weighted sum of a few rows, computed
by an embedding bag, and the gradient is the transposed product, again an embedding bag.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torchvision.ops.poolers import LevelMapper


def pool_regions(
    pooler: Any,
    features: dict[str, Tensor],
    boxes: list[Tensor],
    image_sizes: list[tuple[int, int]],
) -> Tensor:
    """Pool each box from the level that equation 1 of the FPN paper assigns to its size.

    Gradients go to the features, not to the boxes, as with ``torchvision.ops.roi_align``. On
    devices other than the CPU, the pooler itself is called.

    Args:
        pooler: a ``MultiScaleRoIAlign`` of a network, whose settings are used.
        features: ``[B, C, H / s, W / s]`` by level name.
        boxes: per image ``[N, 4]``, xyxy in pixels of the network's input.
        image_sizes: (height, width) of each image before padding.

    Returns:
        ``[sum of N, C, size, size]`` float32.
    """
    levels = [features[name] for name in pooler.featmap_names]
    if levels[0].device.type != "cpu":
        pooled: Tensor = pooler(features, boxes, image_sizes)
        return pooled
    with torch.no_grad():
        samples = _sample(pooler, levels, boxes, max(height for height, _ in image_sizes))
    channels = levels[0].shape[1]
    table = torch.cat([level.float().permute(0, 2, 3, 1).reshape(-1, channels) for level in levels])
    bins: Tensor = _WeightedSums.apply(table, samples.rows, samples.weights)
    height, width = pooler.output_size
    return bins.view(-1, height, width, channels).permute(0, 3, 1, 2)


class _Samples(NamedTuple):
    """What each of M bins is the sum of.

    Attributes:
        rows: int64 ``[M, K]``, cells of the table.
        weights: float32 ``[M, K]``.
    """

    rows: Tensor
    weights: Tensor


def _sample(pooler: Any, levels: list[Tensor], boxes: list[Tensor], height: int) -> _Samples:
    """Find the cells of every bin: ``torchvision.ops.roi_align``'s bilinear neighbours."""
    scales = [2.0 ** round(torch.tensor(f.shape[-2] / height).log2().item()) for f in levels]
    first, last = (round(-torch.tensor(scales[i]).log2().item()) for i in (0, -1))
    level = LevelMapper(first, last, pooler.canonical_scale, pooler.canonical_level)(boxes)
    image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
    sides = torch.tensor([[f.shape[3], f.shape[2]] for f in levels])  # [levels, 2], width first
    cells = sides.prod(dim=1)
    before = (cells * len(boxes)).cumsum(0) - cells * len(boxes)
    first_row = before[level] + image * cells[level]

    aligned = bool(getattr(pooler, "aligned", False))
    scaled = torch.cat(boxes).float() * torch.tensor(scales)[level, None] - 0.5 * aligned
    start, side = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
    if not aligned:
        side = side.clamp(min=1)
    (size, _), ratio = pooler.output_size, pooler.sampling_ratio
    steps = (torch.arange(size * ratio) + 0.5) / (size * ratio)
    position = start[:, :, None] + side[:, :, None] * steps  # [R, 2, size * ratio], x before y
    limit = sides[level, :, None]
    # Samples beyond a one-cell rim count as zeros, those on the rim as the nearest cell.
    present = ((position >= -1) & (position <= limit)).float()
    position = torch.minimum(position.clamp(min=0), limit - 1.0)
    low = position.floor()
    high = torch.minimum(low + 1, limit - 1.0)
    towards_high = position - low
    pairs = torch.stack([low, high], dim=3).long()
    weights = torch.stack([(1 - towards_high) * present, towards_high * present], dim=3)
    pairs = pairs.view(-1, 2, size, 2 * ratio)
    weights = weights.view(-1, 2, size, 2 * ratio)
    row = first_row[:, None, None] + pairs[:, 1] * sides[level, 0][:, None, None]
    rows = row[:, :, None, :, None] + pairs[:, 0][:, None, :, None, :]
    weight = weights[:, 1][:, :, None, :, None] * weights[:, 0][:, None, :, None, :] / ratio**2
    return _Samples(rows.view(-1, 4 * ratio**2), weight.view(-1, 4 * ratio**2))


class _WeightedSums(torch.autograd.Function):
    """Weighted sums of rows of a table: ``[cells, C]``, ``[M, K]``, ``[M, K]`` to ``[M, C]``."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.cells = len(table)  # type: ignore[attr-defined]
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        order = rows.flatten().argsort()
        count = torch.bincount(rows.flatten(), minlength=ctx.cells)  # type: ignore[attr-defined]
        of_table = F.embedding_bag(
            order // rows.shape[1],
            gradient.contiguous(),
            count.cumsum(0) - count,
            mode="sum",
            per_sample_weights=weights.flatten()[order],
        )
        return of_table, None, None
