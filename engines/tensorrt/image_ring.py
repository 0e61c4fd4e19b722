"""ImageRing: pictures on their way to the GPU, ahead of the batch that they will be part of."""

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
    """Where one picture goes up.

    Attributes:
        host: page-locked ``[H, W, 3]`` uint8.
        device: address of as much memory on the GPU.
        uploaded: whoever reads ``device`` on another stream follows it.
    """

    host: NDArray[Any]
    device: int
    uploaded: Event


class ImageRing:
    """Uploads pictures on a stream of its own, so that they go up while the GPU computes.

    ``prefetch`` and ``taken`` may be called from two threads. Both need the CUDA context.

    A picture that was uploaded and is never taken (a pipeline that stops drops what waits) gives
    its place to a later one: the oldest of them, once no place is free.

    Args:
        memory: gets everything that is allocated.
        places: how many; two more at least than are taken at once.
        shape: height and width of a picture.
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
        # By the picture's id, the oldest first; the picture is kept, so that its id stays its own.
        self._ahead: dict[int, tuple[NetworkImage, Place]] = {}
        self._lock = threading.Lock()

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to upload a picture that will be taken later. Does not wait for the GPU."""
        place = self._upload(image)
        with self._lock:
            twice = self._ahead.pop(id(image), None)
            if twice is not None:
                self._free.append(twice[1])
            self._ahead[id(image)] = (image, place)

    @contextmanager
    def taken(self, images: Sequence[NetworkImage]) -> Iterator[list[Place]]:
        """Give the places of pictures; those that nobody has prefetched begin to go up now.

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
            # A picture that was dropped may still be on its way from this very memory.
            place.uploaded.wait()
            place.host[...] = image.pixels
            self._gpu.upload(place.device, place.host, self._stream)
            place.uploaded.record(self._stream)
        except BaseException:
            with self._lock:
                self._free.append(place)
            raise
        return place
