"""Compare the engine with torchvision: equal work and equal answers, on one machine in one run.

Run: ``python -m benchmarks.engine [--json] [--repeat N] [--case NAME ...] [--image FILE]``.

Equal work: every image has 1000 proposals (300 for the default model) and 100 detections with
masks, whatever its content: nothing is suppressed (NMS thresholds are 1) and no score is too low.
torchvision is timed twice: its modules from the image in the network's size to 28x28 masks, which
is what the engine does, and the whole model, which also resizes and pastes 100 masks into full
images. The runs of all programs alternate; medians are reported. Weights are random, except for the
default model's: time does not depend on them.

Equal answer: the default model as its users run it, with every instance above its threshold.
torchvision runs the same weights with its own settings. It computes masks for up to 100 boxes, the
engine only for those that are kept. The detections are checked to be the same. This case needs an
image of people.

Poses: the default model's keypoint branch on two boxes, from the features to positions, as
``estimate_pose`` runs it between detection and masks. "positions" is only the part from heatmaps to
positions. The positions in fp32 are checked against torchvision's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints
from torchvision.ops import box_iou

from maskcast.builder.build import build
from maskcast.builder.checkpoint.checkpoint import load_bundle_weights, save_model
from maskcast.builder.network.network import NetworkConfig, build_network, network_config
from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.engine import Detections
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.keypoints import decode_heatmaps
from maskcast.engines.openvino.engine import OpenVinoEngine, has_bf16

CASES = {
    "resnet50-fpn 800x1344": ("resnet50-fpn", (800, 1344)),
    "resnet50-fpn 320x576": ("resnet50-fpn", (320, 576)),
    "default 256x448": ("default", (256, 448)),
}
ANSWER = "default 256x448, equal answer"
POSES = "default 256x448, poses"
_THROUGHPUT = "openvino int8, throughput"
_SAME_IOU, _SAME_SCORE = 0.8, 0.1
"""Minimum IoU and maximum score difference of an instance in two precisions."""
_PEOPLE = np.array([[50, 30, 120, 220], [200, 60, 260, 200]], np.float32)
"""The boxes whose poses are estimated, as large as people a few metres away."""


def network_of(
    name: str, size: tuple[int, int], *, equal_work: bool = True, with_poses: bool = False
) -> tuple[NetworkConfig, Any]:
    """Make a network; for equal work, one with as many detections as possible in every image."""
    torch.manual_seed(0)
    if name == "default":
        manifest = open_bundle("default").manifest
        keypoints = manifest.keypoints if with_poses else None
        config = network_config("lite0-fpn", manifest.labels[1:], keypoints=keypoints)
    else:
        config = network_config(name, tuple(f"class {index}" for index in range(1, 91)))
    config = replace(config, min_size=min(size), max_size=max(size))
    if equal_work:
        config = replace(config, score_threshold=0.0, rpn_nms_threshold=1.0, box_nms_threshold=1.0)
    network = build_network(config).eval()
    if name == "default":
        load_bundle_weights(network, open_bundle("default"))
    else:  # a trained network has no zeros for biases, which compilers leave out
        for key, values in network.state_dict().items():
            if key.endswith("bias"):
                values.normal_(0, 0.02)
    return config, network


def modules_only(network: Any, rgb: NDArray[np.uint8]) -> int:
    """Run torchvision's modules on an image in the network's size; count the detections."""
    with torch.inference_mode():
        rgb_01 = torch.from_numpy(rgb).permute(2, 0, 1) / 255
        images = network.transform.batch_images([network.transform.normalize(rgb_01)], 32)
        sized = ImageList(images, [rgb.shape[:2]])
        features = network.backbone(images)
        proposals, _ = network.rpn(sized, features)
        (found,), _ = network.roi_heads(features, proposals, sized.image_sizes)
    return len(found["masks"])


def whole_model(network: Any, rgb: NDArray[np.uint8]) -> int:
    """Run torchvision's model as its users do; count the detections."""
    with torch.inference_mode():
        (found,) = network([torch.from_numpy(rgb).permute(2, 0, 1) / 255])
    return len(found["masks"])


def run_engine(engine: OpenVinoEngine, rgb: NDArray[np.uint8]) -> int:
    """Detect and segment; count the detections."""
    size = rgb.shape[0], rgb.shape[1]
    batch = [NetworkImage(rgb, size, size)] * engine.max_batch
    return len(engine.segment(engine.detect(batch, 0.0))[0])


def measure(
    programs: dict[str, Callable[[], int]], repeat: int, images: dict[str, int] | None = None
) -> dict[str, dict[str, float | int]]:
    """Time programs alternately, after a warm-up run of each.

    Some process several ``images`` per run: their times are per image.
    """
    of_run = images or {}
    times: dict[str, list[float]] = {name: [] for name in programs}
    counts = {name: run() for name, run in programs.items()}
    for _ in range(repeat):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1000 / of_run.get(name, 1))
    return {
        name: {
            "median_ms": statistics.median(values),
            "best_ms": min(values),
            "detections": counts[name],
        }
        for name, values in times.items()
    }


def engines_of(
    config: NetworkConfig, network: Any, size: tuple[int, int], rgb: NDArray[np.uint8]
) -> dict[str, OpenVinoEngine]:
    """Build a network in every precision; int8 takes its ranges from the image alone.

    The last one is int8 for throughput.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint, photos = folder / "model.pth", folder / "photos"
        save_model(checkpoint, config, network.state_dict(), {})
        photos.mkdir()
        Image.fromarray(rgb).save(photos / "0.png")
        bundle = build(checkpoint, folder / "fp32", size=size)
        pose = config.keypoints is not None
        engines = {"openvino fp32": OpenVinoEngine(bundle, pose=pose)}
        if has_bf16():
            bf16 = Bundle(bundle.path, replace(bundle.manifest, precision="bf16"))
            engines["openvino bf16"] = OpenVinoEngine(bf16, pose=pose)
        int8 = build(bundle.path, folder / "int8", precision="int8", calibration=photos)
        engines["openvino int8"] = OpenVinoEngine(int8, pose=pose)
        engines[_THROUGHPUT] = OpenVinoEngine(int8, "throughput", pose=pose)
    return engines


def read_pixels(image: Path | None, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read an image in the network's size; without one make noise."""
    if image is None:
        return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return np.array(Image.open(image).convert("RGB").resize(size[::-1]))


def run_answer(image: Path, repeat: int) -> dict[str, Any]:
    """Measure the default model as it is used, and check that the answers agree."""
    size = CASES["default 256x448"][1]
    config, network = network_of("default", size, equal_work=False)
    rgb = read_pixels(image, size)
    threshold = open_bundle("default").manifest.score_threshold
    engines = engines_of(config, network, size, rgb)
    fitted = NetworkImage(rgb, size, size)
    with torch.inference_mode():
        (found,) = network([torch.from_numpy(rgb).permute(2, 0, 1) / 255])
    expected = found["scores"] >= threshold
    boxes, scores = found["boxes"][expected], found["scores"][expected]
    programs: dict[str, Callable[[], int]] = {
        "torchvision": lambda: modules_only(network, rgb),
        "torchvision, pasting": lambda: whole_model(network, rgb),
    }
    for label, engine in engines.items():
        (seen,) = engine.segment(engine.detect([fitted], threshold))
        overlap = box_iou(boxes, torch.from_numpy(seen.boxes))
        best, which = overlap.max(dim=1) if len(seen) else (torch.zeros(len(boxes)), [])
        near = (scores - torch.from_numpy(seen.scores)[which]).abs() <= _SAME_SCORE
        if len(seen) != len(boxes) or not bool(((best >= _SAME_IOU) & near).all()):
            print(f"{label}: answers differ, {len(seen)} instances instead of {len(boxes)}")

        def run(engine: OpenVinoEngine = engine) -> int:
            batch = [fitted] * engine.max_batch
            return len(engine.segment(engine.detect(batch, threshold))[0])

        programs[label] = run
    images = {label: engine.max_batch for label, engine in engines.items()}
    return with_ratios(measure(programs, repeat, images))


def run_poses(image: Path | None, repeat: int) -> dict[str, Any]:
    """Measure the keypoint branch of the default model, and check that the positions agree."""
    size = CASES["default 256x448"][1]
    config, network = network_of("default", size, equal_work=False, with_poses=True)
    blur_cells = config.keypoint_blur_cells
    config = replace(config, keypoint_blur_cells=0.0)  # the positions are torchvision's then
    rgb = read_pixels(image, size)
    heads, boxes = network.roi_heads, torch.from_numpy(_PEOPLE)
    with torch.inference_mode():
        rgb_01 = torch.from_numpy(rgb).permute(2, 0, 1) / 255
        images = network.transform.batch_images([network.transform.normalize(rgb_01)], 32)
        features = network.backbone(images)

    def find_heatmaps() -> torch.Tensor:
        with torch.inference_mode():
            pooled = heads.keypoint_roi_pool(features, [boxes], [size])
            heatmaps: torch.Tensor = heads.keypoint_predictor(heads.keypoint_head(pooled))
        return heatmaps

    heatmaps = find_heatmaps()
    logits = heatmaps.numpy()
    expected = heatmaps_to_keypoints(heatmaps, boxes)[0].numpy()[..., :2]
    programs: dict[str, Callable[[], int]] = {
        "torchvision": lambda: len(heatmaps_to_keypoints(find_heatmaps(), boxes)[0]),
        "torchvision, positions": lambda: len(heatmaps_to_keypoints(heatmaps, boxes)[0]),
        "openvino, positions": lambda: len(decode_heatmaps(logits, _PEOPLE)),
        "filtered positions": lambda: len(decode_heatmaps(logits, _PEOPLE, blur_cells)),
    }
    engines = engines_of(config, network, size, rgb)
    for label, engine in engines.items():
        count = engine.max_batch
        found = engine.detect([NetworkImage(rgb, size, size)] * count, 1.0)
        # Never released: every run uses the features of these images.
        found.boxes = np.tile(_PEOPLE, (count, 1))
        found.image_index = np.repeat(np.arange(count, dtype=np.int32), len(_PEOPLE))

        def run(engine: OpenVinoEngine = engine, found: Detections = found) -> int:
            posed = engine.estimate_pose(found).keypoints
            return 0 if posed is None else len(posed) // engine.max_batch

        programs[label] = run
        posed = engine.estimate_pose(found).keypoints
        apart = 0.0 if posed is None else np.abs(posed[:2, :, :2] - expected).max(axis=2)
        if label == "openvino fp32" and np.mean(apart >= 0.1) > 0.005:
            print(f"{label}: positions differ from torchvision's")
    images_of = {label: engine.max_batch for label, engine in engines.items()}
    return with_ratios(measure(programs, repeat, images_of))


def with_ratios(results: dict[str, dict[str, float | int]]) -> dict[str, Any]:
    """Add how many times faster than torchvision each program is."""
    base = results["torchvision"]["median_ms"]
    return {
        label: {**found, "ratio": base / found["median_ms"]} for label, found in results.items()
    }


def run_case(name: str, image: Path | None, repeat: int) -> dict[str, Any]:
    """Measure one network at one size."""
    network_name, size = CASES[name]
    config, network = network_of(network_name, size)
    rgb = read_pixels(image, size)
    engines = engines_of(config, network, size, rgb)
    programs: dict[str, Callable[[], int]] = {
        "torchvision": lambda: modules_only(network, rgb),
        "torchvision, pasting": lambda: whole_model(network, rgb),
    }
    for label, engine in engines.items():
        programs[label] = lambda engine=engine: run_engine(engine, rgb)  # type: ignore[misc]
    images = {label: engine.max_batch for label, engine in engines.items()}
    return with_ratios(measure(programs, repeat, images))


def run(name: str, image: Path | None, repeat: int) -> dict[str, Any]:
    """Measure a case by its name."""
    if name == POSES:
        return run_poses(image, repeat)
    if name == ANSWER:
        assert image is not None
        return run_answer(image, repeat)
    return run_case(name, image, repeat)


def main() -> None:
    """Measure and print."""
    choices = [*CASES, ANSWER, POSES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--case", action="append", choices=choices, help="only this one")
    parser.add_argument("--image", type=Path, help="input image; noise by default")
    arguments = parser.parse_args()
    chosen = arguments.case or [name for name in choices if arguments.image or name != ANSWER]
    if ANSWER in chosen and arguments.image is None:
        parser.error("--image: equal answers need an image of people")
    results = {name: run(name, arguments.image, arguments.repeat) for name in chosen}
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        print(json.dumps({"machine": machine, "repeat": arguments.repeat, "cases": results}))
        return
    table = Table("", "median ms", "best ms", "detections", "times torchvision")
    for name, found in results.items():
        table.add_section()
        for label, row in found.items():
            table.add_row(
                f"{name}, {label}",
                f"{row['median_ms']:.2f}",
                f"{row['best_ms']:.2f}",
                str(row["detections"]),
                f"{row['ratio']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
