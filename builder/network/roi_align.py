"""RoIAlign over a feature pyramid, in torch: the reference for its other implementations."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

_FINEST_LEVEL = 2
_CANONICAL_LEVEL, _CANONICAL_SIZE, _LEVEL_EPSILON = 4.0, 224.0, 1e-6


def pool_pyramid(
    levels: Sequence[Tensor],
    rois: Tensor,
    batch_index: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each region from the pyramid level that suits its size.

    The level is equation 1 of Lin et al., "Feature Pyramid Networks" (CVPR 2017), clamped to P2 to
    P5, as torchvision's ``LevelMapper`` computes it. Gradients go to the features.

    Args:
        levels: P2 to P5, ``[B, C, H / 4, W / 4]`` to ``[B, C, H / 32, W / 32]``.
        rois: float32 ``[R, 4]``, xyxy in pixels of the network's input.
        batch_index: integer ``[R]``, which image each region lies in.
        output_size: side S of the pooled grid.
        sampling_ratio: samples along each side of a bin.
        aligned: pixel centres lie at half-integers; otherwise regions narrower than one cell of
            the level are widened to it (``torchvision.ops.roi_align``).

    Returns:
        ``[R, C, S, S]`` of the features' type.
    """
    sides = rois[:, 2:] - rois[:, :2]
    scale = torch.sqrt(sides[:, 0] * sides[:, 1]) / _CANONICAL_SIZE
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(scale) + _LEVEL_EPSILON)
    level = level.clamp(_FINEST_LEVEL, _FINEST_LEVEL + len(levels) - 1)
    regions = torch.cat([batch_index[:, None].to(rois.dtype), rois], dim=1)
    pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], output_size, output_size)
    for number, features in enumerate(levels, start=_FINEST_LEVEL):
        chosen = torch.where(level == number)[0]
        # float32 inside, whatever the features' type: coordinates need it.
        pooled[chosen] = roi_align(
            features.float(),
            regions[chosen],
            (output_size, output_size),
            1 / 2**number,
            sampling_ratio,
            aligned,
        ).to(pooled.dtype)
    return pooled


class AlignedMultiScaleRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """Multi-level RoIAlign with ``aligned=True``, which torchvision's module does not offer."""

    aligned = True

    def forward(
        self,
        x: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        """Pool each box from the level that suits its size, see ``pool_pyramid``.

        Args:
            x: features P2 to P5 by level name.
            boxes: per image ``[N, 4]``, xyxy in pixels of the network's input.
            image_shapes: not used; the strides of the levels are known.

        Returns:
            ``[sum of N, C, size, size]``.
        """
        image = torch.cat([torch.full_like(b[:, 0], i) for i, b in enumerate(boxes)])
        levels = [x[name] for name in self.featmap_names]
        size = self.output_size[0]
        return pool_pyramid(levels, torch.cat(boxes), image, size, self.sampling_ratio, True)
