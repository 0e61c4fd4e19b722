"""Streams: both graphs of a bundle compiled for one input shape, once for each image at a time."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from maskcast.engines.instances import MASK_SIZE
from maskcast.engines.openvino.compiled import (
    FEATURES,
    Graph,
    Request,
    fix_detector,
    fix_segmenter,
    levels,
    split,
)

BOXES_AT_ONCE = (32, 16, 8, 4, 2, 1)
"""Numbers of boxes that the segmenter is compiled for; any other number is a sum of them."""
_ATTEMPTS = 3
_TOLERANCE = 0.01
"""Largest difference of an output between two streams, as a fraction of its largest value."""

_logger = logging.getLogger(__name__)

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Models:
    """A bundle's graphs as OpenVINO read them, and how to compile them.

    Attributes:
        detector: images to boxes and features.
        segmenter: features and boxes to mask crops; None for a Faster R-CNN.
        precision: "f32" or "bf16".
    """

    detector: ov.Model
    segmenter: ov.Model | None
    precision: str


class Stream:
    """The compiled graphs that work on one image at a time, and a request for each.

    ``detect`` and ``segment`` may run at the same time, each on one thread.

    Args:
        detector: the compiled detector.
        segmenters: by the number of boxes that each takes; empty for a Faster R-CNN.
    """

    def __init__(self, detector: Graph, segmenters: Mapping[int, Graph]) -> None:
        self._detector: Request = detector.request()
        self._segmenters = {boxes: graph.request() for boxes, graph in segmenters.items()}

    def detect(
        self, pixels: NDArray[np.uint8], content: tuple[int, int], features: ov.Tensor
    ) -> Outputs:
        """Find boxes in an image.

        Args:
            pixels: ``[H, W, 3]`` uint8 RGB of the compiled shape.
            content: height and width of the image inside ``pixels``.
            features: where to write the features, ``[cells, C]`` float32.

        Returns:
            ``boxes`` ``[1, D, 4]``, ``scores`` ``[1, D]`` and ``labels`` ``[1, D]``, copied.
        """
        request = self._detector
        request.set_input("images", tensor(pixels[None]))
        request.set_input("sizes", tensor(np.array([content], np.float32)))
        request.set_output(FEATURES, features)
        request.infer()
        return {name: request.output(name).data.copy() for name in ("boxes", "scores", "labels")}

    def segment(
        self, features: ov.Tensor, boxes: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Compute the mask crops ``[R, 28, 28]`` in 0..1 of any number of boxes of an image."""
        masks = np.empty((len(boxes), MASK_SIZE, MASK_SIZE), np.float32)
        done = 0
        while done < len(boxes):
            count = next(number for number in BOXES_AT_ONCE if number <= len(boxes) - done)
            part = slice(done, done + count)
            masks[part] = self.segment_exactly(features, boxes[part], labels[part])
            done += count
        return masks

    def segment_exactly(
        self, features: ov.Tensor, boxes: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Compute the mask crops of a number of boxes that a graph was compiled for."""
        request = self._segmenters[len(boxes)]
        request.set_input(FEATURES, features)
        request.set_input("boxes", tensor(boxes))
        request.set_input("labels", tensor(labels.astype(np.int64)))
        request.set_input("batch_index", tensor(np.zeros(len(boxes), np.int32)))
        request.infer()
        masks: NDArray[np.float32] = request.output("masks").data
        return masks


class CompiledShape:
    """The streams of one input shape, and memory for the features of the images in flight.

    Attributes:
        streams: each works on one image at a time.
        features: free tensors ``[cells, C]`` float32.
        has_masks: False for a Faster R-CNN.
    """

    def __init__(
        self, streams: Sequence[Stream], features: Sequence[ov.Tensor], has_masks: bool
    ) -> None:
        self.streams = streams
        self.features: queue.Queue[ov.Tensor] = queue.Queue()
        for free in features:
            self.features.put(free)
        self.has_masks = has_masks


def compile_shape(
    core: ov.Core,
    models: Models,
    size: tuple[int, int],
    *,
    streams: int,
    threads: int | None,
    in_flight: int,
) -> CompiledShape:
    """Compile a bundle's graphs for an input shape and check what they compute.

    Every stream compiles its own graphs instead of sharing those of one compiled model: OpenVINO
    then shares packed weights between streams under keys that hold addresses, and results of such
    graphs were wrong once. No stream runs before all are compiled. Then each runs a test image,
    and all must agree; a single stream is compared with another one that is compiled for that.

    Args:
        core: of OpenVINO.
        models: what to compile.
        size: height and width of the input.
        streams: how many images are worked on at the same time.
        threads: of each stream; None for one stream on all cores, which is not checked.
        in_flight: how many images' features there is memory for.

    Raises:
        RuntimeError: the streams disagree again each time that they are compiled.
    """
    detector = split(fix_detector(models.detector, size), models.precision)
    segmenters = {}
    if models.segmenter is not None:
        segmenters = {
            boxes: split(fix_segmenter(models.segmenter, size, boxes), models.precision)
            for boxes in BOXES_AT_ONCE
        }

    def compile_stream(_: int = 0) -> Stream:
        return Stream(
            Graph(core, detector, threads),
            {boxes: Graph(core, parts, threads) for boxes, parts in segmenters.items()},
        )

    cells = sum(rows * columns for rows, columns in levels(size).values())
    channels = models.detector.output("p2").get_partial_shape()[1].get_length()
    features = [ov.Tensor(ov.Type.f32, [cells, channels]) for _ in range(in_flight)]
    compiled = (
        [compile_stream()]
        if threads is None
        else _compile_until_equal(compile_stream, streams, size, features[0], bool(segmenters))
    )
    return CompiledShape(compiled, features, bool(segmenters))


def _compile_until_equal(
    compile_stream: Callable[[int], Stream],
    count: int,
    size: tuple[int, int],
    features: ov.Tensor,
    has_masks: bool,
) -> list[Stream]:
    for attempt in range(_ATTEMPTS):
        # One at a time after a failure: the cause may be two compilations at the same time.
        with ThreadPoolExecutor(1 if attempt else count, "load stream") as threads:
            compiled = list(threads.map(compile_stream, range(max(count, 2))))
        wrong = find_difference(compiled, size, features, has_masks)
        if wrong is None:
            return compiled[:count]
        stream, output = wrong
        _logger.error(
            "streams_disagree",
            extra={
                "fields": {
                    "stream": stream,
                    "output": output,
                    "height": size[0],
                    "width": size[1],
                    "attempt": attempt + 1,
                    "openvino": ov.__version__,
                }
            },
        )
    raise RuntimeError(
        f"OpenVINO {ov.__version__} compiled graphs for {size[0]}x{size[1]} that give different "
        f"results, {_ATTEMPTS} times; use mode latency, or another version of OpenVINO"
    )


def find_difference(
    streams: Sequence[Stream], size: tuple[int, int], features: ov.Tensor, has_masks: bool
) -> tuple[int, str] | None:
    """Run every graph of every stream on a fixed image and compare with the first stream.

    Args:
        streams: at least two.
        size: height and width of their input.
        features: memory for features, overwritten.
        has_masks: whether there are segmenters.

    Returns:
        Number of a stream that differs from the first, and in which output; None if all agree.
    """
    expected = _test_outputs(streams[0], size, features, has_masks)
    for number, stream in enumerate(streams[1:], 1):
        for name, found in _test_outputs(stream, size, features, has_masks).items():
            limit = _TOLERANCE * max(float(np.abs(expected[name]).max(initial=0)), 1e-6)
            # Not a number is a difference too, whichever side it is on.
            if not (np.abs(found - expected[name]) <= limit).all():
                return number, name
    return None


def _test_outputs(
    stream: Stream, size: tuple[int, int], features: ov.Tensor, has_masks: bool
) -> Outputs:
    """Run a stream's graphs on noise, which activates every channel, and fixed boxes."""
    random = np.random.default_rng(0)
    height, width = size
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    features.data[:] = 0  # what the stream before wrote must not count
    outputs = stream.detect(pixels, size, features)
    outputs[FEATURES] = features.data.copy()
    for count in BOXES_AT_ONCE if has_masks else ():
        corners = random.uniform(0, 0.7, (count, 2))
        far = np.minimum(corners + random.uniform(0.05, 0.9, (count, 2)), 1)
        boxes = np.concatenate([corners, far], 1) * [width, height, width, height]
        outputs[f"masks of {count}"] = stream.segment_exactly(
            features, boxes.astype(np.float32), np.ones(count, np.int32)
        ).copy()
    return outputs


def tensor(array: NDArray[Any]) -> ov.Tensor:
    """Copy an array into a tensor of OpenVINO's."""
    return ov.Tensor(np.ascontiguousarray(array))
