"""A decoded image for the kernel preprocess_planes, and what libswscale makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from maskcast.engines.planes import read_planes
from maskcast.engines.tensorrt.plugins.library import Kernels, device_planes


class Decoded:
    """A case of preprocess_planes: a decoded image, half as large again as the network's input."""

    def __init__(self, device: Any, size: tuple[int, int], pixel_format: str = "nv12") -> None:
        rng = np.random.default_rng(0)
        self.size = size
        self.frame = av.VideoFrame(size[1] * 3 // 2, size[0] * 3 // 2, pixel_format)
        for plane in self.frame.planes:
            memory = memoryview(plane)
            memory[:] = rng.integers(16, 236, len(memory), np.uint8).tobytes()
        planes = read_planes(self.frame, 0)
        assert planes is not None
        packed = np.concatenate([np.ascontiguousarray(one).ravel() for one in planes.arrays])
        # The frame does not say where its chroma lies: libswscale takes the middle.
        self.planes = replace(planes, chroma_shift=0.0)
        self.held, self.kernels = device.put(packed), Kernels()
        self.inputs = device.put(np.zeros((3, *size), "f4"))
        self.addresses = device.pointer(self.held), device.pointer(self.inputs)
        self.stream = device.stream

    def run(self) -> None:
        given = device_planes(self.planes, self.addresses[0], self.size)
        self.kernels.preprocess_planes([given], self.addresses[1], self.size, 0.0, self.stream)

    def wanted(self) -> Any:
        """Convert with libswscale, with chroma of its own for each pixel."""
        how = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        height, width = self.size
        scaled = VideoReformatter().reformat(
            self.frame, width=width, height=height, format="rgb24", interpolation=int(how)
        )
        return scaled.to_ndarray().transpose(2, 0, 1).astype("f4")
