"""Engine: the interface between the pipeline and a device that runs a bundle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Manifest
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.instances.instances import Instances

Mode = Literal["latency", "throughput"]
"""What an engine optimises for: the time of each image, or the number of images per second."""


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
        features: the FPN levels P2..P5, in the engine's own form and memory.
        release: gives the features' memory back to the engine. ``segment`` calls it; code that
            drops detections without segmenting them must call it. Calling it twice is safe.
        keypoints: ``[R, K, 3]`` float32, x and y in pixels of the network's input, score in 0..1;
            None without ``estimate_pose``.
    """

    images: Sequence[NetworkImage]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    image_index: NDArray[np.int32]
    features: Any
    release: Callable[[], None]
    keypoints: NDArray[np.float32] | None = None


class Engine(ABC):
    """Runs a bundle on one device.

    ``prefetch``, ``detect`` and ``segment`` may be called from three different threads at the same
    time, each from one thread only: the mask stage works on frame t while inference works on
    frame t + 1 and preprocessing on frame t + 2. ``estimate_pose`` is called from the thread of
    ``segment``, before it. ``prepare`` may be called from any thread.
    """

    manifest: Manifest
    device: str
    """Library, device and precision, for display: "OpenVINO CPU bf16"."""
    max_batch: int
    """Maximum number of images of one ``detect``."""
    decode_device: Literal["cuda"] | None = None
    """Hardware on the engine's own device that can decode video."""
    has_pose: bool = False
    """Whether the bundle's poser is loaded, so that ``estimate_pose`` can be called."""
    _is_closed: bool = False

    def __repr__(self) -> str:
        name, batch = self.manifest.name, self.max_batch
        return f"<{type(self).__name__} {name!r} on {self.device}, batch up to {batch}>"

    def fit(self, frame: av.VideoFrame, rotation: int) -> NetworkImage:
        """Make the network's input from a decoded image; see ``fit_image``.

        An engine may resize and convert the image later, on its device. Any thread may call this.

        Raises:
            av.error.FFmpegError: the image cannot be converted.
        """
        return fit_image(frame, rotation, self.manifest.input)

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to copy an image to the device, so that ``detect`` finds it there.

        Optional: ``detect`` takes any image. Does not wait for the device. An image that never
        reaches ``detect`` need not be released. Does nothing on a CPU.
        """
        del image

    def prepare(self, height: int, width: int) -> bool:
        """Begin to prepare for inputs of a shape; return whether the engine is ready for them.

        Optional, and does not wait; ``detect`` waits until the engine is ready. A caller that asks
        first can drop frames that would be outdated by then, and frames of other shapes need not
        wait behind them.
        """
        del height, width
        return True

    @abstractmethod
    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in 1 to ``max_batch`` images of one shape; drop scores below ``min_score``.

        Blocks while all the memory for features is in use by detections not yet released.

        Raises:
            RuntimeError: the engine is closed.
            ValueError: there are more images than ``max_batch``, or none.
        """

    def estimate_pose(self, detections: Detections) -> Detections:
        """Find the keypoints of the kept boxes; return the detections with them.

        Call it before ``segment``, which releases the features and keeps the keypoints.

        Raises:
            RuntimeError: the engine was loaded without pose, or is closed.
        """
        del detections
        raise RuntimeError("no poser is loaded; load the engine with pose=True")

    @abstractmethod
    def segment(self, detections: Detections) -> list[Instances]:
        """Compute the mask crops of the kept boxes; one ``Instances`` per image, in batch order.

        Boxes and keypoints are in source pixels. Without a mask branch, ``masks`` is None.

        Raises:
            RuntimeError: the engine is closed.
        """

    def run(self, images: Sequence[NetworkImage], min_score: float) -> list[Instances]:
        """Find the instances in a batch: boxes, keypoints if a poser is loaded, masks."""
        detections = self.detect(images, min_score)
        try:
            if self.has_pose:
                detections = self.estimate_pose(detections)
            return self.segment(detections)
        finally:
            detections.release()

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory. The engine cannot be used afterwards."""

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed; load it again")

    def _check_batch(self, images: Sequence[NetworkImage]) -> None:
        if not 1 <= len(images) <= self.max_batch:
            raise ValueError(f"{len(images)} images: this engine takes 1 to {self.max_batch}")


def keep_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    min_score: float,
) -> dict[str, NDArray[Any]]:
    """Select the boxes with a score of at least ``min_score`` from a detector's padded outputs.

    Args:
        boxes: ``[B, D, 4]``.
        scores: ``[B, D]``, descending; 0 where there is no box.
        labels: ``[B, D]``; 0 where there is no box.
        min_score: 0..1.

    Returns:
        ``boxes``, ``scores``, ``labels`` and ``image_index`` of ``Detections``.
    """
    # take() on flat arrays is the fastest selection in numpy; this runs for every frame.
    kept = ((labels > 0) & (scores >= min_score)).ravel().nonzero()[0]
    return {
        "boxes": boxes.reshape(-1, 4).take(kept, axis=0),
        "scores": scores.take(kept),
        "labels": labels.take(kept).astype(np.int32),
        "image_index": (kept // scores.shape[1]).astype(np.int32),
    }


def to_instances(
    detections: Detections, masks: NDArray[np.float32] | NDArray[np.uint8] | None
) -> list[Instances]:
    """Convert a batch's boxes and keypoints to source pixels and its masks to uint8.

    Args:
        detections: of the batch.
        masks: ``[R, 28, 28]``, float32 in 0..1 or uint8 in 0..255; None without a mask branch.
    """
    crops: NDArray[np.uint8] | None = None
    if masks is not None:
        # astype always copies: the engine's next call overwrites the masks.
        crops = (np.rint(masks * 255) if masks.dtype != np.uint8 else masks).astype(np.uint8)
    count = len(detections.images)
    ends = [len(detections.boxes)]  # of each image's boxes
    if count > 1:
        ends = np.searchsorted(detections.image_index, np.arange(1, count + 1)).tolist()
    found = []
    start = 0
    for image, end in zip(detections.images, ends, strict=True):
        mine, start = slice(start, end), end
        scale, limit = _to_source(image.content, image.source)
        keypoints = None
        if detections.keypoints is not None:
            keypoints = detections.keypoints[mine].copy()
            keypoints[..., :2] = _scaled(keypoints[..., :2], scale[:2], limit[:2])
        found.append(
            Instances(
                width=image.source[1],
                height=image.source[0],
                boxes=_scaled(detections.boxes[mine], scale, limit),
                scores=detections.scores[mine],
                labels=detections.labels[mine],
                masks=None if crops is None else crops[mine],
                keypoints=keypoints,
            )
        )
    return found


@lru_cache(maxsize=256)
def _to_source(
    content: tuple[int, int], source: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the factors of x, y, x, y from the network's input to the source, and their limits."""
    height, width = source
    scale = np.array([width / content[1], height / content[0]] * 2, np.float32)
    return scale, np.array([width, height] * 2, np.float32)


def _scaled(
    points: NDArray[np.float32], scale: NDArray[np.float32], limit: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scale coordinates and clip them to 0..limit."""
    scaled: NDArray[np.float32] = points * scale
    np.minimum(scaled, limit, out=scaled)
    np.maximum(scaled, 0, out=scaled)
    return scaled
