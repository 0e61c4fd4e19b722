"""Instances: what was seen in one frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MASK_SIZE = 28
"""Side of a mask crop in cells: the mask head's output (He et al., Mask R-CNN, figure 4)."""


@dataclass(frozen=True, slots=True)
class Instances:
    """What was seen in one frame: arrays of one length N that are indexed together.

    Attributes:
        width, height: size of the source picture, pixels.
        boxes: ``[N, 4]`` float32, x1 y1 x2 y2 in source pixels, inside the picture.
        scores: ``[N]`` float32 in 0..1, descending.
        labels: ``[N]`` int32, index into the model's label names (0 is the background, never seen).
        masks: ``[N, 28, 28]`` uint8, probability x 255 inside the box, as the network gives it; or
            None where the model has no mask branch.
    """

    width: int
    height: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    masks: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.boxes)
