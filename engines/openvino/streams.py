"""Streams: the graphs of a bundle compiled for one input shape, once for each concurrent image."""

from __future__ import annotations

import logging
import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from maskcast.engines.instances.instances import MASK_SIZE
from maskcast.engines.instances.keypoints import decode_heatmaps
from maskcast.engines.memory import give_back_memory
from maskcast.engines.openvino.cache import DamagedEntryError, Entry, GraphCache
from maskcast.engines.openvino.compiled import (
    FEATURES,
    Exported,
    Graph,
    Request,
    fix_box_graph,
    fix_detector,
    split,
)
from maskcast.engines.openvino.models import HEATMAPS, MASKS, Models

BOXES_AT_ONCE = (8, 4, 1)
"""Numbers of boxes that graphs are compiled for; other numbers are split into these."""
_DETECTOR = "detector"
_ATTEMPTS = 3
_TOLERANCE = 0.01
"""Largest difference of an output between two streams, as a fraction of its largest value."""
_STORED_CELLS = 4096
"""Number of cells of the test image's features that are stored for comparison."""

_logger = logging.getLogger(__name__)

Outputs = dict[str, NDArray[Any]]


class Stream:
    """The compiled graphs that work on one image at a time, and a request for each.

    ``detect`` may run at the same time as ``segment`` or ``estimate_pose``, each on one thread.

    Args:
        detector: the compiled detector.
        of_boxes: segmenter and poser, by their output and the number of boxes that each takes.
    """

    def __init__(self, detector: Graph, of_boxes: Mapping[tuple[str, int], Graph]) -> None:
        self._graphs = {_DETECTOR: detector}
        self._graphs |= {_graph_name(*key): graph for key, graph in of_boxes.items()}
        self._detector: Request = detector.request()
        self._of_boxes = {key: graph.request() for key, graph in of_boxes.items()}
        self.features_shape = detector.features_shape

    @classmethod
    def load(
        cls,
        core: ov.Core,
        graphs: Mapping[str, Exported],
        threads: int | None,
        outputs: Sequence[str],
    ) -> Stream:
        """Load the graphs that ``export`` returned.

        Raises:
            RuntimeError: OpenVINO cannot read them.
            KeyError: some are missing.
        """
        of_boxes = {
            (output, boxes): Graph.load(core, graphs[_graph_name(output, boxes)], threads)
            for output in outputs
            for boxes in BOXES_AT_ONCE
        }
        return cls(Graph.load(core, graphs[_DETECTOR], threads), of_boxes)

    def export(self) -> dict[str, Exported]:
        """Return the compiled graphs as bytes, by name."""
        return {name: graph.export() for name, graph in self._graphs.items()}

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
        for part in _parts(len(boxes)):
            masks[part] = self.run_exactly(MASKS, features, boxes[part], labels[part])
        return masks

    def estimate_pose(
        self, features: ov.Tensor, boxes: NDArray[np.float32], k: int, blur_cells: float
    ) -> NDArray[np.float32]:
        """Find the ``k`` keypoints of any number of boxes of an image: ``[R, k, 3]``.

        For ``blur_cells``, see ``decode_heatmaps``.
        """
        keypoints = np.empty((len(boxes), k, 3), np.float32)
        for part in _parts(len(boxes)):
            heatmaps = self.run_exactly(HEATMAPS, features, boxes[part])
            keypoints[part] = decode_heatmaps(heatmaps, boxes[part], blur_cells)
        return keypoints

    def run_exactly(
        self,
        output: str,
        features: ov.Tensor,
        boxes: NDArray[np.float32],
        labels: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """Compute an output for a number of boxes that its graph was compiled for.

        Args:
            output: "masks" or "heatmaps".
            features: of the image.
            boxes: ``[R, 4]``.
            labels: ``[R]``, for masks.

        Returns:
            The output, in memory that is overwritten by the next call.
        """
        request = self._of_boxes[output, len(boxes)]
        request.set_input(FEATURES, features)
        request.set_input("boxes", tensor(boxes))
        if labels is not None:
            request.set_input("labels", tensor(labels.astype(np.int64)))
        request.set_input("batch_index", tensor(np.zeros(len(boxes), np.int32)))
        request.infer()
        found: NDArray[np.float32] = request.output(output).data
        return found


def _parts(count: int) -> Iterator[slice]:
    """Divide a number of boxes into numbers that graphs are compiled for."""
    done = 0
    while done < count:
        most = next(number for number in BOXES_AT_ONCE if number <= count - done)
        yield slice(done, done + most)
        done += most


def _graph_name(output: str, boxes: int) -> str:
    return f"{output} of {boxes}"


class CompiledShape:
    """The streams of one input shape, and memory for the features of the images in flight.

    Attributes:
        streams: each works on one image at a time.
        features: free tensors ``[cells, C]`` float32.
    """

    def __init__(self, streams: Sequence[Stream], features: Sequence[ov.Tensor]) -> None:
        self.streams = streams
        self.features: queue.Queue[ov.Tensor] = queue.Queue()
        for free in features:
            self.features.put(free)


def compile_shape(
    core: ov.Core,
    models: Models,
    size: tuple[int, int],
    *,
    streams: int,
    threads: int | None,
    in_flight: int,
    cache: GraphCache,
) -> CompiledShape:
    """Load a bundle's graphs for an input shape, or compile them, and check what they compute.

    Every stream has its own graphs instead of sharing those of one compiled model: otherwise
    OpenVINO shares packed weights between streams under keys that contain addresses, and such
    graphs once gave wrong results. No stream runs before all are ready. Then each runs a test
    image. The outputs of compiled graphs must agree between streams; a single stream is compared
    with another one that is compiled for this purpose. The outputs of loaded graphs must agree with
    those that were stored; otherwise all graphs are compiled.

    Args:
        core: of OpenVINO.
        models: what to compile.
        size: height and width of the input.
        streams: number of images that are processed at the same time.
        threads: of each stream; None for one stream on all cores, which is not checked when it is
            compiled.
        in_flight: number of images whose features fit in memory at the same time.
        cache: where compiled graphs are stored.

    Raises:
        RuntimeError: the streams disagree each time that they are compiled.
    """
    began_s = time.monotonic()
    compiled = _load(core, models, size, streams, threads, cache)
    is_cached = compiled is not None
    if compiled is None:
        compiled, outputs = _compile(core, models, size, streams, threads)
        outputs[FEATURES] = _thinned(outputs[FEATURES])
        cache.store(size, Entry.make(compiled[0].export(), outputs))
    shown = _fields(size, streams=streams, cached=is_cached, s=round(time.monotonic() - began_s, 3))
    _logger.info("graphs_ready", extra=shown)
    give_back_memory()  # compiling and loading leave tens of megabytes unused
    features = [ov.Tensor(ov.Type.f32, compiled[0].features_shape) for _ in range(in_flight)]
    return CompiledShape(compiled, features)


def _load(
    core: ov.Core,
    models: Models,
    size: tuple[int, int],
    count: int,
    threads: int | None,
    cache: GraphCache,
) -> list[Stream] | None:
    """Load the streams from the cache; None if they are not there or compute something else."""
    try:
        if (entry := cache.load(size)) is None:
            return None

        def load_stream(_: int) -> Stream:
            return Stream.load(core, entry.graphs, threads, models.outputs)

        with ThreadPoolExecutor(count, "load stream") as loaders:
            loaded = list(loaders.map(load_stream, range(count)))
    except (DamagedEntryError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:200]
        _logger.warning("stored_graphs_damaged", extra=_fields(size, reason=reason))
        return None
    wrong = find_difference(loaded, size, models.outputs, entry.outputs)
    entry.release_pages()  # OpenVINO has copied the weights into its own layout
    if wrong is None:
        return loaded
    stream, output = wrong
    _logger.error("stored_graphs_disagree", extra=_fields(size, stream=stream, output=output))
    return None


def _compile(
    core: ov.Core, models: Models, size: tuple[int, int], count: int, threads: int | None
) -> tuple[list[Stream], Outputs]:
    """Compile the streams; return them, and what they compute for the test image."""
    detector = split(fix_detector(models.detector, size), models.precision)
    of_boxes = {
        (output, boxes): split(fix_box_graph(model, size, boxes), models.precision)
        for output, model in models.of_boxes.items()
        for boxes in BOXES_AT_ONCE
    }

    def compile_stream(_: int = 0) -> Stream:
        return Stream(
            Graph.compile(core, detector, threads),
            {key: Graph.compile(core, parts, threads) for key, parts in of_boxes.items()},
        )

    if threads is None:
        stream = compile_stream()
        return [stream], _test_outputs(stream, size, models.outputs)
    return _compile_until_equal(compile_stream, count, size, models.outputs)


def _compile_until_equal(
    compile_stream: Callable[[int], Stream],
    count: int,
    size: tuple[int, int],
    names: Sequence[str],
) -> tuple[list[Stream], Outputs]:
    for attempt in range(_ATTEMPTS):
        # One at a time after a failure: concurrent compilation may be the cause.
        with ThreadPoolExecutor(1 if attempt else count, "load stream") as threads:
            compiled = list(threads.map(compile_stream, range(max(count, 2))))
        outputs = _test_outputs(compiled[0], size, names)
        wrong = find_difference(compiled[1:], size, names, outputs)
        if wrong is None:
            return compiled[:count], outputs
        stream, output = wrong
        shown = _fields(
            size,
            stream=stream + 1,
            output=output,
            attempt=attempt + 1,
            openvino=ov.__version__,
        )
        _logger.error("streams_disagree", extra=shown)
    raise RuntimeError(
        f"OpenVINO {ov.__version__} compiled graphs for {size[0]}x{size[1]} that give different "
        f"results, {_ATTEMPTS} times; use mode latency, or another version of OpenVINO"
    )


def find_difference(
    streams: Sequence[Stream], size: tuple[int, int], names: Sequence[str], expected: Outputs
) -> tuple[int, str] | None:
    """Run every graph of every stream on the test image and compare what they compute.

    Args:
        streams: to check.
        size: height and width of their input.
        names: outputs of the segmenter and the poser.
        expected: the outputs of another stream, or the stored ones.

    Returns:
        Index of a stream that computes something else, and in which output; None if none does.
    """
    for number, stream in enumerate(streams):
        for name, found in _test_outputs(stream, size, names).items():
            if not _agree(expected.get(name), found):
                return number, name
    return None


def _agree(expected: NDArray[Any] | None, found: NDArray[Any]) -> bool:
    if expected is not None and expected.shape != found.shape:
        found = _thinned(found)
    if expected is None or expected.shape != found.shape:
        return False
    limit = _TOLERANCE * max(float(np.abs(expected).max(initial=0)), 1e-6)
    # A NaN on either side counts as a difference.
    return bool((np.abs(found - expected) <= limit).all())


def _test_outputs(stream: Stream, size: tuple[int, int], names: Sequence[str]) -> Outputs:
    """Run a stream's graphs on noise, which activates every channel, and fixed boxes."""
    noise = random.Random(0)  # numpy's generators would take 3 MB
    height, width = size
    pixels = np.frombuffer(noise.randbytes(height * width * 3), np.uint8)
    pixels = pixels.reshape(height, width, 3)
    features = ov.Tensor(ov.Type.f32, stream.features_shape)
    outputs = stream.detect(pixels, size, features)
    outputs[FEATURES] = features.data
    for count in BOXES_AT_ONCE:
        corners = np.array([noise.uniform(0, 0.7) for _ in range(2 * count)]).reshape(count, 2)
        sides = np.array([noise.uniform(0.05, 0.9) for _ in range(2 * count)]).reshape(count, 2)
        far = np.minimum(corners + sides, 1)
        boxes = (np.concatenate([corners, far], 1) * [width, height, width, height]).astype("f4")
        for name in names:
            labels = np.ones(count, np.int32) if name == MASKS else None
            found = stream.run_exactly(name, features, boxes, labels)
            # All cells of all heatmaps would take megabytes.
            kept = found[..., ::4, ::4] if name == HEATMAPS else found
            outputs[f"{name} of {count}"] = kept.copy()
    return outputs


def _thinned(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return evenly spread cells of features, which are tens of megabytes for a large image."""
    return features[:: -(-len(features) // _STORED_CELLS)]


def _fields(size: tuple[int, int], **details: object) -> dict[str, object]:
    return {"fields": {"height": size[0], "width": size[1], **details}}


def tensor(array: NDArray[Any]) -> ov.Tensor:
    """Copy an array into an OpenVINO tensor."""
    return ov.Tensor(np.ascontiguousarray(array))
