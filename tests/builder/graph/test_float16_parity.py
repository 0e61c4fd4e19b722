"""The graphs that TensorRT compiles, in fp16 and int8, detect what torchvision detects in fp32.

onnxruntime runs them, and OpenVINO where it can. The images are drawings with a photograph of a
person, so that there is always something to compare, and those of the folder MASKCAST_PHOTOS, if it
is set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace

from maskcast.builder.graph.quantization import quantise_graphs
from maskcast.builder.images import read_calibration_images
from maskcast.builder.tensorrt.plans import prepare_graph
from maskcast.engines.bundle import Bundle, FixedInput, default_bundle, open_bundle
from maskcast.engines.image import NetworkImage
from maskcast.engines.onnxruntime import OnnxRuntimeEngine
from maskcast.engines.openvino.engine import OpenVinoEngine

pytestmark = pytest.mark.skipif(
    not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
)

SIZE = (288, 512)
MIN_SCORE = 0.5
MARGIN = 0.1
"""Detections this close to ``MIN_SCORE`` may be above it in only one of the results."""


class Tolerance(NamedTuple):
    """How far a detection may be from torchvision's.

    Attributes:
        box_px: corners, in pixels of the network's input; in the mean over all detections.
        score: difference, in the mean.
        mask_iou: of the 28x28 crops cut at a half, in the mean.
        missed: share of torchvision's detections that may be missing.
    """

    box_px: float
    score: float
    mask_iou: float
    missed: float


TOLERANCES = {
    "fp32": Tolerance(box_px=0.01, score=1e-4, mask_iou=0.995, missed=0),
    "fp16": Tolerance(box_px=0.75, score=0.01, mask_iou=0.98, missed=0.05),
    "int8": Tolerance(box_px=5, score=0.05, mask_iou=0.92, missed=0.15),
}


SESSION = onnxruntime.InferenceSession


def photographs() -> list[Any]:
    """Read up to 40 images of the folder that MASKCAST_PHOTOS names."""
    if "MASKCAST_PHOTOS" not in os.environ:
        pytest.skip("MASKCAST_PHOTOS names no folder of photographs")
    shape = FixedInput(*SIZE, open_bundle("default").manifest.input.pad_value)
    return read_calibration_images(Path(os.environ["MASKCAST_PHOTOS"]), shape)[:40]


@pytest.fixture(scope="module", params=["drawn", "photographed"])
def images(request: pytest.FixtureRequest, parity: Any) -> list[Any]:
    """Make images: half of them for calibration, half for the comparison."""
    if request.param == "photographed":
        return photographs()
    return [parity.fit(parity.draw_people(*SIZE, seed=seed)) for seed in range(12)]


@pytest.fixture(scope="module")
def truths(images: list[Any], parity: Any) -> list[Any]:
    network = parity.default_network
    found = []
    for image in images[len(images) // 2 :]:
        height, width = image.content
        truth = parity.see_with_torchvision(network, image.pixels[:height, :width], SIZE)
        found.append(truth)
    return found


@pytest.fixture(scope="module", params=list(TOLERANCES))
def prepared(
    request: pytest.FixtureRequest, images: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Make the default bundle with its graphs as ``builder.tensorrt`` prepares them."""
    default = open_bundle("default")
    folder = tmp_path_factory.mktemp(request.param)
    paths = [path for path in (default.detector, default.segmenter) if path is not None]
    graphs = {path.stem: onnx.load(path) for path in paths}
    if request.param == "int8":
        quantise_graphs(graphs, images[: len(images) // 2])
    for name, graph in graphs.items():
        prepare_graph(graph, request.param, SIZE, folder / f"{name}.onnx")
        onnx.save(graph, folder / f"{name}.onnx")
    shape = FixedInput(*SIZE, default.manifest.input.pad_value)
    return Bundle(folder, replace(default.manifest, precision=request.param, input=shape))


def iou(one: Any, other: Any) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    return float(shared / (sum(np.prod(box[2:] - box[:2]) for box in (one, other)) - shared))


def mask_iou(one: Any, other: Any) -> float:
    one, other = one >= 0.5, other >= 0.5
    return float((one & other).sum() / max((one | other).sum(), 1))


def compare(engine: Any, images: list[Any], truths: list[Any]) -> dict[str, float]:
    """Match detections by box; those well above the threshold must be in both results."""
    sure = MIN_SCORE + MARGIN
    boxes, scores, masks = [], [], []
    counts = {"sure": 0, "missed": 0, "extra": 0}
    for image, truth in zip(images, truths, strict=True):
        here = NetworkImage(image.pixels, image.content, image.content)  # no way back to a source
        (found,) = engine.segment(engine.detect([here], MIN_SCORE - MARGIN))
        left = set(range(len(found)))
        for index in np.nonzero(truth.scores >= MIN_SCORE - MARGIN)[0]:
            overlaps = {other: iou(truth.boxes[index], found.boxes[other]) for other in left}
            best = max(overlaps, key=overlaps.__getitem__, default=None)
            is_sure = truth.scores[index] >= sure
            counts["sure"] += int(is_sure)
            if best is None or overlaps[best] < 0.7:
                counts["missed"] += int(is_sure)
                continue
            left.remove(best)
            if not is_sure:
                continue
            boxes.append(np.abs(truth.boxes[index] - found.boxes[best]).max())
            scores.append(abs(truth.scores[index] - found.scores[best]))
            masks.append(mask_iou(truth.masks[index], found.masks[best] / 255))
        counts["extra"] += int((found.scores[sorted(left)] >= sure).sum())
    means = {name: float(np.mean(values)) for name, values in
             {"box_px": boxes, "score": scores, "mask_iou": masks}.items()}  # fmt: skip
    return counts | means | {"box_px_most": float(max(boxes))}


def assert_within(figures: dict[str, float], tolerance: Tolerance) -> None:
    assert figures["sure"] >= 10, figures
    assert figures["missed"] <= tolerance.missed * figures["sure"], figures
    assert figures["extra"] <= tolerance.missed * figures["sure"], figures
    assert figures["box_px"] <= tolerance.box_px, figures
    assert figures["score"] <= tolerance.score, figures
    assert figures["mask_iou"] >= tolerance.mask_iou, figures


def plain_session(model: Any, options: Any = None, **named: Any) -> Any:
    options = options or named.pop("sess_options", None) or onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return SESSION(model, options, **named)


def test_prepared_graphs_detect_what_torchvision_detects(
    prepared: Bundle,
    images: list[Any],
    truths: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if prepared.manifest.precision == "int8":
        # onnxruntime's optimiser (1.32) turns float16 scales into infinities; the graph has none.
        monkeypatch.setattr(onnxruntime, "InferenceSession", plain_session)
    engine = OnnxRuntimeEngine(prepared)
    figures = compare(engine, images[len(images) // 2 :], truths)
    assert_within(figures, TOLERANCES[prepared.manifest.precision])


# OpenVINO's RoIAlign takes features and boxes of one type; TensorRT's fp16 and int8 graphs have
# float16 features and float32 boxes. int8 runs from the portable graphs, as always in OpenVINO.
@pytest.mark.parametrize("prepared", ["fp32"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_detects_the_same(
    prepared: Bundle, precision: str, images: list[Any], truths: list[Any]
) -> None:
    manifest = replace(prepared.manifest, precision=precision)
    folder = prepared.path if precision == "fp32" else open_bundle("default").path
    engine = OpenVinoEngine(Bundle(folder, manifest))
    figures = compare(engine, images[len(images) // 2 :], truths)
    engine.close()
    assert_within(figures, TOLERANCES[precision])
