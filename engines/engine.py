"""Engine: the seam between the pipeline and a device that runs a bundle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Manifest
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances import Instances

Mode = Literal["latency", "throughput"]
"""What an engine is to be best at: an answer to each picture soon, or many pictures a second."""


@dataclass(slots=True)
class Detections:
    """The boxes of one batch, on the way from ``Engine.detect`` to ``Engine.segment``.

    Attributes:
        images: the batch.
        boxes: ``[R, 4]`` float32, x1 y1 x2 y2 in pixels of the network's input; kept boxes of the
            whole batch, grouped by image, best first within an image.
        scores: ``[R]`` float32.
        labels: ``[R]`` int32.
        image_index: ``[R]`` int32, which image of the batch each box belongs to, ascending.
        features: the FPN levels P2..P5 in whatever form and memory the engine keeps them.
        release: gives the features' memory back to the engine. ``segment`` calls it; whoever
            drops detections without segmenting them calls it himself. Calling it twice is safe.
    """

    images: Sequence[NetworkImage]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    image_index: NDArray[np.int32]
    features: Any
    release: Callable[[], None]


class Engine(ABC):
    """Runs a bundle on one device.

    ``prefetch``, ``detect`` and ``segment`` may be called from three different threads at the same
    time, each from one thread only: the mask stage works on frame t while inference works on
    frame t + 1 and preprocessing on frame t + 2. ``prepare`` may be called from any thread.
    """

    manifest: Manifest
    device: str
    """What runs it, for people: "OpenVINO CPU bf16"."""
    max_batch: int
    """The most images that one ``detect`` takes."""

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to bring an image to the device, so that ``detect`` finds it there.

        Never needed: ``detect`` takes any image. Does not wait for the device. An image that is
        never detected costs nothing. Where the device is the CPU this does nothing.
        """
        del image

    def prepare(self, height: int, width: int) -> bool:
        """Begin to make ready for inputs of a shape; tell whether that is done. Does not wait.

        Never needed: ``detect`` waits until it is ready. Who asks before can let pictures pass that
        would be old when they are detected, and keeps others from waiting behind them.
        """
        del height, width
        return True

    @abstractmethod
    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in 1 to ``max_batch`` images of one shape; keep those scored ``min_score`` up.

        Blocks while all the memory for features is in use by detections not yet released.
        """

    @abstractmethod
    def segment(self, detections: Detections) -> list[Instances]:
        """Compute the mask crops of the kept boxes; one ``Instances`` an image, in batch order.

        Boxes come out in source pixels. A model without a mask branch passes through with
        ``masks=None``.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory. The engine cannot be used afterwards."""
