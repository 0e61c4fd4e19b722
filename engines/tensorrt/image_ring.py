"""ImageRing: images that are uploaded before the batch that they belong to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.image import NetworkImage
from maskcast.engines.tensorrt.device import Event, Memory


@dataclass(frozen=True, slots=True)
class Place:
    """Memory of one image.

    Attributes:
        host: page-locked ``[H, W, 3]`` uint8.
        device: address of the same number of bytes on the GPU.
        uploaded: the end of the copy; a stream that reads ``device`` must follow it.
    """

    host: NDArray[Any]
    device: int
    uploaded: Event


class ImageRing:
    """Uploads images on a stream of its own, while the GPU computes.

    ``prefetch`` and ``taken`` may be called from two threads. Both need the CUDA context.

    When no place is free, a new image takes the place of the oldest one that was uploaded and not
    taken: a pipeline that stops drops images that wait.

    Args:
        memory: receives all allocations.
        places: number of images; at least two more than are taken at once.
        shape: height and width of an image.
    """

    def __init__(self, memory: Memory, places: int, shape: tuple[int, int]) -> None:
        self._gpu = memory.gpu
        self._stream = memory.stream()
        size = (*shape, 3)
        bytes_each = int(np.prod(size))
        host = memory.pinned((places, *size), np.uint8)
        device = memory.device((places, *size), np.uint8)
        self._free = deque(
            Place(host[i], device + i * bytes_each, memory.event()) for i in range(places)
        )
        # By the image's id, the oldest first; the image is kept so that its id stays its own.
        self._ahead: dict[int, tuple[NetworkImage, Place]] = {}
        self._lock = threading.Lock()

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to upload an image that will be taken later. Does not wait for the GPU."""
        place = self._upload(image)
        with self._lock:
            twice = self._ahead.pop(id(image), None)
            if twice is not None:
                self._free.append(twice[1])
            self._ahead[id(image)] = (image, place)

    @contextmanager
    def taken(self, images: Sequence[NetworkImage]) -> Iterator[list[Place]]:
        """Yield the places of images; upload those that have not been prefetched.

        The GPU must have read them when the block is left.
        """
        places: list[Place] = []
        try:
            for image in images:
                with self._lock:
                    found = self._ahead.pop(id(image), None)
                places.append(self._upload(image) if found is None else found[1])
            yield places
        finally:
            with self._lock:
                self._free.extend(places)

    def _upload(self, image: NetworkImage) -> Place:
        with self._lock:
            if self._free:
                place = self._free.popleft()
            else:
                _, place = self._ahead.pop(next(iter(self._ahead)))
        try:
            # A dropped image may still be in transfer from this memory.
            place.uploaded.wait()
            place.host[...] = image.pixels
            self._gpu.upload(place.device, place.host, self._stream)
            place.uploaded.record(self._stream)
        except BaseException:
            with self._lock:
                self._free.append(place)
            raise
        return place
