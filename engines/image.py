"""NetworkImage: a picture as the network takes it, and the way back to source pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class NetworkImage:
    """A picture, resized and padded to the shape of a network's input.

    Attributes:
        pixels: ``[H, W, 3]`` uint8 RGB, C-contiguous. H and W are multiples of 32. The picture
            lies at the top left; right of it and below it is padding.
        content: height and width of the picture inside ``pixels``.
        source: height and width of the picture before it was resized.
    """

    pixels: NDArray[np.uint8]
    content: tuple[int, int]
    source: tuple[int, int]
