"""Steps: the engine's work on the GPU, in fixed memory, with few shapes, as CUDA graphs.

Each step has a stream, one block of inputs and one of outputs, so that one copy goes each way.
Every combination of a slot of features and a shape is run once at the start and then captured in a
CUDA graph, which later calls launch. If it cannot be captured, the work is queued call by call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from maskcast.engines.tensorrt.device import Block, Memory
from maskcast.engines.tensorrt.image_ring import Place
from maskcast.engines.tensorrt.plan import LoadedPlan, Run
from maskcast.engines.tensorrt.plugins.library import Kernels

FEATURES = ("p2", "p3", "p4", "p5")
_DOWN = ("boxes", "scores", "labels")


@dataclass(frozen=True, slots=True)
class Slot:
    """Memory for the features of one batch, between ``detect`` and ``segment``.

    Attributes:
        index: which of the slots.
        features: device addresses by name.
    """

    index: int
    features: dict[str, int]


class Step:
    """A plan with its stream and its work: a CUDA graph or a function for each shape."""

    def __init__(self, memory: Memory, plan: LoadedPlan) -> None:
        self.plan = plan
        self.stream = memory.stream()
        self._memory = memory
        self._works: dict[tuple[int, int], Callable[[], None]] = {}

    def _warm(self, count: int, slot: Slot, run: Run, work: Callable[[], None]) -> None:
        """Do work once, so that everything is compiled and allocated; then capture it.

        Args:
            count: number of images or boxes.
            slot: features that are written or read.
            run: of the plan, a part of the work.
            work: queues everything on the stream.
        """
        work()
        self.stream.wait()
        graph = None
        if run.capturable(self.stream.handle):
            graph = self._memory.graph(self.stream, work)
        self._works[count, slot.index] = work if graph is None else graph.launcher(self.stream)

    def _run(self, count: int, slot: Slot) -> None:
        self._works[count, slot.index]()
        self.stream.wait()


class DetectStep(Step):
    """Finds boxes; one batch at a time.

    Args:
        memory: receives all allocations.
        plan: of the detector.
        kernels: of this GPU.
        max_batch: images at once, at most.
        shape: height and width of an image.
        pad_value: 0..255, for the padding of images that the GPU resizes.
    """

    def __init__(
        self,
        memory: Memory,
        plan: LoadedPlan,
        kernels: Kernels,
        max_batch: int,
        shape: tuple[int, int],
        pad_value: int,
    ) -> None:
        super().__init__(memory, plan)
        self._kernels, self._max_batch, self._shape = kernels, max_batch, shape
        self._pad_value = pad_value
        self._images = memory.device((max_batch, 3, *shape), np.float32)
        self._up = Block(memory, {"sizes": ((2,), np.float32)}, max_batch)
        down = {name: (plan.shape(name, 1)[1:], plan.dtype(name)) for name in _DOWN}
        self._down = Block(memory, down, max_batch)
        # TensorRT needs addresses for the other outputs, which are not read.
        others = [name for name in plan.outputs if name not in (*_DOWN, *FEATURES)]
        self._others = {
            name: memory.device(plan.shape(name, max_batch), plan.dtype(name)) for name in others
        }

    def slot(self, index: int) -> Slot:
        """Allocate the features of a batch."""
        shapes = {name: self.plan.shape(name, self._max_batch) for name in FEATURES}
        return Slot(
            index,
            {
                name: self._memory.device(shape, self.plan.dtype(name))
                for name, shape in shapes.items()
            },
        )

    def warm_up(self, slots: Sequence[Slot]) -> None:
        """Run every size of batch once."""
        for slot in slots:
            for count in range(1, self._max_batch + 1):
                self._up.arrays(count)["sizes"][:] = self._shape
                run = self._prepare(count, slot)
                self._warm(count, slot, run, partial(self._work, count, run))
        self.plan.on_warm()

    def run(
        self, places: Sequence[Place], contents: Sequence[tuple[int, int]], slot: Slot
    ) -> dict[str, NDArray[Any]]:
        """Detect in uploaded images; return the detector's boxes, scores and labels by name.

        The arrays are overwritten by the next call. The features are in the slot.
        """
        count = len(places)
        self._up.arrays(count)["sizes"][:] = contents
        for place in places:
            self.stream.follow(place.uploaded)
        self._preprocess(places)
        self._run(count, slot)
        return self._down.arrays(count)

    def _preprocess(self, places: Sequence[Place]) -> None:
        """Make the network's input; consecutive images of the same form share a launch.

        Their places differ from call to call, so this is not part of the CUDA graph.
        """
        pixels, stream, first = self._shape[0] * self._shape[1], self.stream.handle, 0
        for has_planes, alike in groupby(places, lambda place: place.planes is not None):
            some = list(alike)
            inputs = self._images + first * 3 * pixels * np.dtype(np.float32).itemsize
            if has_planes:
                planes = [place.planes for place in some if place.planes is not None]
                self._kernels.preprocess_planes(
                    planes, inputs, self._shape, self._pad_value, stream
                )
            else:
                self._kernels.preprocess([place.device for place in some], inputs, pixels, stream)
            first += len(some)

    def _prepare(self, count: int, slot: Slot) -> Run:
        addresses = {"images": self._images, **self._others, **slot.features}
        addresses |= self._up.addresses(count) | self._down.addresses(count)
        return self.plan.prepare(
            {"images": (count, 3, *self._shape), "sizes": (count, 2)}, addresses
        )

    def _work(self, count: int, run: Run) -> None:
        self._up.upload(count, self.stream)
        run.start(self.stream.handle)
        self._down.download(count, self.stream)


class BoxStep(Step, ABC):
    """Computes an output for each box; one batch at a time.

    The number of boxes changes with every frame, and each new shape costs TensorRT time (and
    TensorRT-RTX a compilation). So boxes are padded to the next larger of a few fixed numbers.

    Args:
        memory: receives all allocations.
        plan: takes features and boxes.
        features: shapes of the features of a whole batch, by name.
        max_boxes: boxes at once, at most.
        given: names of the plan's other inputs.
        down: name, shape and dtype of one box's result as it is downloaded.
    """

    def __init__(
        self,
        memory: Memory,
        plan: LoadedPlan,
        features: dict[str, tuple[int, ...]],
        max_boxes: int,
        given: Sequence[str],
        down: tuple[str, tuple[int, ...], DTypeLike],
    ) -> None:
        super().__init__(memory, plan)
        self._features, self.buckets = features, buckets(max_boxes)
        up = {name: (plan.shape(name, 1)[1:], plan.dtype(name)) for name in given}
        self._up = Block(memory, up, max_boxes)
        self._result, self.shape, self._dtype = down
        self._down = Block(memory, {self._result: (self.shape, self._dtype)}, max_boxes)

    def warm_up(self, slots: Sequence[Slot]) -> None:
        """Run every number of boxes once."""
        for slot in slots:
            for bucket in self.buckets:
                self._fill(bucket, {})
                run = self._prepare(bucket, slot)
                self._warm(bucket, slot, run, partial(self._work, bucket, run))
        self.plan.on_warm()

    def run(self, boxes: dict[str, NDArray[Any]], slot: Slot) -> NDArray[Any]:
        """Compute the results of some boxes.

        Args:
            boxes: ``boxes`` ``[R, 4]``, ``labels`` ``[R]``, ``batch_index`` ``[R]``.
            slot: features of their batch.

        Returns:
            ``[R, ...]``, overwritten by the next call.
        """
        count = len(boxes["boxes"])
        if count == 0:
            return np.zeros((0, *self.shape), self._dtype)
        bucket = next(bucket for bucket in self.buckets if bucket >= count)
        self._fill(bucket, boxes)
        self._run(bucket, slot)
        return self._down.arrays(bucket)[self._result][:count]

    def _fill(self, bucket: int, boxes: dict[str, NDArray[Any]]) -> None:
        """Write boxes to the block; the rest of the bucket belongs to no image: it pools zeros."""
        for name, array in self._up.arrays(bucket).items():
            given = boxes.get(name, array[:0])
            count = len(given)
            array[:count] = given
            if count < bucket:
                array[count:] = -1 if name == "batch_index" else 0

    def _prepare(self, bucket: int, slot: Slot) -> Run:
        # Always the features of a whole batch: RoIAlign reads only the images that have boxes.
        given = {name: array.shape for name, array in self._up.arrays(bucket).items()}
        addresses = {**self._up.addresses(bucket), **slot.features, **self._outputs(bucket)}
        return self.plan.prepare(self._features | given, addresses)

    def _work(self, bucket: int, run: Run) -> None:
        self._up.upload(bucket, self.stream)
        run.start(self.stream.handle)
        self._finish(bucket)
        self._down.download(bucket, self.stream)

    def _result_address(self, bucket: int) -> int:
        """Return the device address of the results before they are downloaded."""
        return self._down.addresses(bucket)[self._result]

    @abstractmethod
    def _outputs(self, bucket: int) -> dict[str, int]:
        """Return the addresses of the plan's outputs."""

    def _finish(self, bucket: int) -> None:
        """Queue the conversion of the plan's outputs to results."""


class SegmentStep(BoxStep):
    """Computes mask crops of boxes: ``[R, 28, 28]`` uint8, 0..255. Arguments: see ``BoxStep``."""

    def __init__(
        self,
        memory: Memory,
        plan: LoadedPlan,
        kernels: Kernels,
        features: dict[str, tuple[int, ...]],
        max_boxes: int,
    ) -> None:
        crop = plan.shape("masks", 1)[1:]
        given = ("boxes", "labels", "batch_index")
        super().__init__(memory, plan, features, max_boxes, given, ("crops", crop, np.uint8))
        self._kernels = kernels
        self._masks = memory.device((max_boxes, *crop), np.float32)

    def _outputs(self, bucket: int) -> dict[str, int]:
        return {"masks": self._masks}

    def _finish(self, bucket: int) -> None:
        to, values = self._result_address(bucket), bucket * math.prod(self.shape)
        self._kernels.crops_to_bytes(self._masks, to, values, self.stream.handle)


class PoseStep(BoxStep):
    """Computes heatmaps of boxes: ``[R, K, 56, 56]`` float32. Arguments: see ``BoxStep``."""

    def __init__(
        self,
        memory: Memory,
        plan: LoadedPlan,
        features: dict[str, tuple[int, ...]],
        max_boxes: int,
    ) -> None:
        down = ("heatmaps", plan.shape("heatmaps", 1)[1:], np.float32)
        super().__init__(memory, plan, features, max_boxes, ("boxes", "batch_index"), down)

    def _outputs(self, bucket: int) -> dict[str, int]:
        return {"heatmaps": self._result_address(bucket)}


def buckets(most: int) -> tuple[int, ...]:
    """Return the numbers of boxes that are run: powers of two below ``most``, and ``most``."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)
