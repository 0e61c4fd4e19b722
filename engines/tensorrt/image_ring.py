"""ImageRing: uploads images before the batch that they belong to is detected."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage, PlanarImage
from maskcast.engines.tensorrt.device import Event, Memory
from maskcast.engines.tensorrt.plugins.library import DevicePlanes, device_planes

_logger = logging.getLogger(__name__)

_GRANULE = 1 << 20
"""Places grow to a multiple of this, bytes."""


@dataclass(slots=True)
class Place:
    """Memory of one image.

    Attributes:
        host: page-locked bytes.
        device: address of the same number of bytes on the GPU.
        uploaded: the end of the copy; a stream that reads ``device`` must follow it.
        planes: description of its planes on the GPU; None for ``[H, W, 3]`` uint8 RGB.
    """

    host: NDArray[Any]
    device: int
    uploaded: Event
    planes: DevicePlanes | None = None


class ImageRing:
    """Uploads images on a stream of its own, while the GPU computes.

    ``prefetch`` and ``taken`` may be called from two threads. Both need the CUDA context.

    When no place is free, a new image replaces the oldest one that was uploaded and not taken:
    a pipeline that stops never takes the images that wait.

    A place has the size of an image in RGB, and grows when the planes of a decoded image need more.
    If there is no memory for that, libswscale resizes such images.

    Args:
        memory: receives all allocations.
        places: number of images; at least two more than are taken at once.
        shape: height and width of an image.
    """

    def __init__(self, memory: Memory, places: int, shape: tuple[int, int]) -> None:
        self._gpu, self._memory = memory.gpu, memory
        self._stream = memory.stream()
        self._shape = (*shape, 3)
        self._size = int(np.prod(self._shape))
        self._free = deque(
            Place(
                memory.pinned((self._size,), np.uint8),
                memory.device((self._size,), np.uint8),
                memory.event(),
            )
            for _ in range(places)
        )
        # By the image's id, the oldest first; keeping the image keeps its id unique.
        self._ahead: dict[int, tuple[NetworkImage, Place]] = {}
        self._lock = threading.Lock()
        self._growing = threading.Lock()
        self._cannot_grow = False

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to upload an image that will be taken later. Does not wait for the GPU."""
        place = self._upload(image)
        with self._lock:
            earlier = self._ahead.pop(id(image), None)
            if earlier is not None:
                self._free.append(earlier[1])
            self._ahead[id(image)] = (image, place)

    @contextmanager
    def taken(self, images: Sequence[NetworkImage]) -> Iterator[list[Place]]:
        """Yield the places of images; upload those that have not been prefetched.

        The GPU must have read them before the block ends.
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
            size = self._fill(place, image)
            self._gpu.upload(place.device, place.host[:size], self._stream)
            place.uploaded.record(self._stream)
        except BaseException:
            with self._lock:
                self._free.append(place)
            raise
        return place

    def _fill(self, place: Place, image: NetworkImage) -> int:
        """Write an image to a place's memory on the host; return its size, bytes."""
        if isinstance(image, PlanarImage) and self._fits(place, image.planes.byte_count):
            at = 0
            for array in image.planes.arrays:
                place.host[at : at + array.size].reshape(array.shape)[...] = array
                at += array.size
            place.planes = device_planes(image.planes, place.device, image.content)
            return at
        place.host[: self._size].reshape(self._shape)[...] = image.pixels
        place.planes = None
        return self._size

    def _fits(self, place: Place, size: int) -> bool:
        """Return whether an unused place has this size; grow it if not."""
        if size <= place.host.size:
            return True
        size = -(-size // _GRANULE) * _GRANULE
        with self._growing:
            if self._cannot_grow:
                return False
            try:
                device = self._memory.device((size,), np.uint8)
                host = self._memory.pinned((size,), np.uint8)
            except (InputError, self._gpu.error) as error:
                self._cannot_grow = True
                _logger.warning("image_resized_on_host", extra={"fields": {"reason": str(error)}})
                return False
            self._memory.release(place.device, place.host)
        place.device, place.host = device, host
        return True
