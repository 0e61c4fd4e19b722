"""Everything there is to know on a GPU, in one command: build, parity, time, memory, power.

Run: ``python -m benchmarks.gpu [--model default|COCO_V1|FILE] [--size HxW] [--pictures FOLDER]
[--clip FILE] [--out gpu.json]``.

Every precision is built and run on the same pictures. Truth is torch, eager, float32, on the same
GPU. Times are medians of synchronous calls after a warm-up: bytes up, detection, boxes down, masks,
crops down. ``--dry`` does the same without a GPU: plans are built for the usual cards but not run,
OpenVINO stands in for the engine and the CPU for torch's device; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from maskcast.builder.build import build
from maskcast.builder.checkpoint.checkpoint import load_bundle_weights, load_network
from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.tensorrt.process import Built
from maskcast.engines.bundle import Bundle, FixedInput, open_bundle
from maskcast.engines.engine import Engine
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.engines.plan import Package
from maskcast.pipeline.config_file import make_config
from maskcast.pipeline.pipeline import Pipeline

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "int8")
PUBLISHED_MS = {
    "NVIDIA's detectron2 sample, A5000, 1344x1344": {"fp32": 25.9, "fp16": 13.0, "int8": 7.3},
    "mmdeploy, T4, 800x1344": {"fp32": 104.8, "fp16": 58.3},
    "torchvision, V100, pasting": {"fp32": 90.3},
    "detectron2, V100": {"fp32": 43.0},
    "the paper, M40": {"fp32": 195.0},
}
"""Figures of others, on other cards; nobody here could repeat them."""

_SMI = "name,driver_version,power.draw,memory.used,clocks.sm"


def open_model(name: str, scratch: Path, size: tuple[int, int]) -> tuple[Bundle, Any]:
    """Give a model as a bundle of portable graphs and as a torch network in eval mode."""
    if name == "default":
        bundle = open_bundle("default")
        network = build_network(network_config("lite0-fpn", bundle.manifest.labels[1:]))
        load_bundle_weights(network, bundle)
    else:
        _, network = load_network(name)
        bundle = build(name, scratch / "portable", size=size)
    network.eval().transform.min_size, network.transform.max_size = (min(size),), max(size)
    return bundle, network


def read_pictures(folder: Path | None, size: tuple[int, int], count: int) -> list[NetworkImage]:
    """Read up to ``count`` pictures from a folder; noise where none is given."""
    shape = FixedInput(*size, 127)
    if folder is None:
        noise = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
        return [NetworkImage(pixels, size, size) for pixels in noise]
    images = []
    for path in sorted(folder.iterdir())[:count]:
        rgb = np.array(Image.open(path).convert("RGB"))
        images.append(fit_image(av.VideoFrame.from_ndarray(rgb, "rgb24"), 0, shape))
    return images


def run_torch(network: Any, image: NetworkImage, device: str) -> dict[str, NDArray[Any]]:
    """Run torchvision's modules on a picture in the network's size: boxes, scores, mask crops."""
    height, width = image.content
    with torch.inference_mode():
        pixels = torch.from_numpy(image.pixels[:height, :width]).to(device)
        picture = network.transform.normalize(pixels.permute(2, 0, 1) / 255)
        padded = torch.zeros((1, 3, *image.pixels.shape[:2]), device=device)
        padded[0, :, :height, :width] = picture
        sized = ImageList(padded, [(height, width)])
        features = network.backbone(padded)
        proposals, _ = network.rpn(sized, features)
        (found,), _ = network.roi_heads(features, proposals, sized.image_sizes)
    return {name: found[name].cpu().numpy() for name in ("boxes", "scores", "labels", "masks")}


def parity(
    engine: Engine, network: Any, images: Sequence[NetworkImage], device: str, min_score: float
) -> dict[str, float]:
    """Compare the engine's instances with torch's, picture by picture.

    A box of torch is matched by the engine's box of the same label that overlaps it most, if their
    IoU is 0.7 or more.
    """
    counts = {"torch": 0, "engine": 0, "matched": 0}
    ious: list[float] = []
    scores: list[float] = []
    masks: list[float] = []
    for image in images:
        wanted = run_torch(network, image, device)
        kept = wanted["scores"] >= min_score
        # In the network's pixels: the engine's way back to the source is left out.
        here = NetworkImage(image.pixels, image.content, image.content)
        (found,) = engine.segment(engine.detect([here], min_score))
        counts["torch"] += int(kept.sum())
        counts["engine"] += len(found)
        if not kept.any() or len(found) == 0:
            continue
        overlap = box_iou(torch.from_numpy(wanted["boxes"][kept]), torch.from_numpy(found.boxes))
        overlap *= torch.from_numpy(wanted["labels"][kept][:, None] == found.labels[None])
        for i, (iou, j) in enumerate(zip(*(t.tolist() for t in overlap.max(dim=1)), strict=True)):
            if iou < 0.7:
                continue
            counts["matched"] += 1
            ious.append(iou)
            scores.append(abs(float(wanted["scores"][kept][i] - found.scores[j])))
            if isinstance(found.masks, np.ndarray):
                crop = wanted["masks"][kept][i, 0]
                masks.append(float(np.abs(crop - found.masks[j] / 255).mean()))
    mean = statistics.fmean
    return {
        **counts,
        "iou_mean": mean(ious) if ious else 0.0,
        "score_difference_mean": mean(scores) if scores else 0.0,
        "mask_difference_mean": mean(masks) if masks else 0.0,
    }


def median_ms(run: Callable[[], Any], repeat: int, warm_up: int) -> float:
    """Time a synchronous call: median of ``repeat`` after ``warm_up`` that do not count."""
    times = []
    for i in range(warm_up + repeat):
        start = time.perf_counter()
        run()
        if i >= warm_up:
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def time_engine(
    engine: Engine, image: NetworkImage, repeat: int, warm_up: int, min_score: float
) -> dict[str, Any]:
    """Time detection and masks, for every size of batch that is a power of two."""
    results: dict[str, Any] = {}
    batch = 1
    while batch <= engine.max_batch:
        images = [image] * batch
        detect = median_ms(
            lambda images=images: engine.detect(images, min_score).release(),  # type: ignore[misc]
            repeat,
            warm_up,
        )
        both = median_ms(
            lambda images=images: engine.segment(engine.detect(images, min_score)),  # type: ignore[misc]
            repeat,
            warm_up,
        )
        results[str(batch)] = {
            "detect_ms": detect,
            "segment_ms": both - detect,
            "total_ms": both,
            "images_per_s": 1000 * batch / both,
        }
        batch *= 2
    return results


def time_pipeline(engine: Engine, clip: Path) -> dict[str, Any]:
    """Run the whole pipeline over a clip, without publishing."""
    config = make_config({"sources": [{"url": str(clip)}], "publish": None})
    pipeline = Pipeline(config, engine)
    pipeline.run()
    stats = pipeline.stats()
    stages = {name: stage.frame_ms.p50 for name, stage in stats.stages.items()}
    return {"fps": stats.fps, "processed": stats.processed, "stage_ms_p50": stages}


def time_torch(network: Any, image: NetworkImage, device: str, repeat: int) -> dict[str, float]:
    """Time torch, eager and with its backbone compiled."""
    results = {"eager_ms": median_ms(lambda: run_torch(network, image, device), repeat, 2)}
    if device != "cpu":
        plain = network.backbone
        network.backbone = torch.compile(plain)
        results["compiled_ms"] = median_ms(lambda: run_torch(network, image, device), repeat, 3)
        network.backbone = plain
    return results


def gpu_state() -> dict[str, str] | None:
    """Ask nvidia-smi for name, driver, power and memory; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    values = (value.strip() for value in line.splitlines()[0].split(","))
    return dict(zip(_SMI.split(","), values, strict=True))


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Build and measure every precision."""
    height, _, width = arguments.size.partition("x")
    size = int(height), int(width)
    device = "cpu" if arguments.dry else "cuda"
    bundle, network = open_model(arguments.model, scratch, size)
    network.to(device)
    images = read_pictures(arguments.pictures, size, arguments.count)
    min_score = bundle.manifest.score_threshold
    results: dict[str, Any] = {
        "dry": arguments.dry,
        "model": arguments.model,
        "size": arguments.size,
        "gpu": gpu_state(),
        "torch": time_torch(network, images[0], device, arguments.repeat),
        "published_ms": PUBLISHED_MS,
        "precisions": {},
    }
    package: Package = arguments.package
    for precision in arguments.precision or PRECISIONS:
        built: dict[str, Built] = {}
        made = build(
            bundle.path,
            scratch / precision,
            backend=package,
            precision=precision,
            size=size,
            max_batch=arguments.batch,
            calibration=images if precision == "int8" else None,
            on_plan=built.__setitem__,
        )
        engine = open_engine(made, dry=arguments.dry)
        measured = {
            "built": {name: msgspec.to_builtins(value) for name, value in built.items()},
            "parity": parity(engine, network, images, device, min_score),
            "time": time_engine(engine, images[0], arguments.repeat, arguments.warm_up, min_score),
            "pipeline": time_pipeline(engine, arguments.clip) if arguments.clip else None,
            "gpu": gpu_state(),  # power and memory straight after the work
        }
        engine.close()
        results["precisions"][precision] = measured
    return results


def open_engine(bundle: Bundle, *, dry: bool) -> Engine:
    """Open the engine that is measured: TensorRT's, or OpenVINO's in its place."""
    if dry:
        return OpenVinoEngine(Bundle(bundle.path, replace(bundle.manifest, precision="fp32")))
    from maskcast.engines.tensorrt.engine import TensorRTEngine

    return TensorRTEngine(bundle)


def as_table(results: dict[str, Any]) -> Table:
    """Lay the results out for people."""
    gpu = results["gpu"] or {"name": "no GPU"}
    title = f"{results['model']} {results['size']} on {gpu['name']}"
    if results["dry"]:
        title += " (dry run on the CPU: its times mean nothing)"
    table = Table("", "ms", "images/s", "matched", "IoU", "plan MB", "build s", title=title)
    for name, value in results["torch"].items():
        table.add_row(f"torch {name.removesuffix('_ms')}", f"{value:.2f}", f"{1000 / value:.1f}")
    for precision, measured in results["precisions"].items():
        plans = measured["built"].values()
        found = measured["parity"]
        for batch, timed in measured["time"].items():
            table.add_row(
                f"{precision}, batch {batch}",
                f"{timed['total_ms']:.2f}",
                f"{timed['images_per_s']:.1f}",
                f"{found['matched']}/{found['torch']}",
                f"{found['iou_mean']:.3f}",
                f"{sum(plan['plan_bytes'] for plan in plans) / 1e6:.1f}",
                f"{sum(plan['build_s'] for plan in plans):.1f}",
            )
    table.add_section()
    for who, figures in results["published_ms"].items():
        for precision, value in figures.items():
            table.add_row(f"{who}, {precision}", f"{value:.1f}", f"{1000 / value:.1f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="default", help="default, or a checkpoint")
    parser.add_argument("--size", default="288x512", help="HEIGHTxWIDTH of the network's input")
    parser.add_argument("--batch", type=int, default=4, help="the most images at once")
    parser.add_argument("--package", default="tensorrt_rtx", choices=("tensorrt", "tensorrt_rtx"))
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only this one")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; noise by default")
    parser.add_argument("--count", type=int, default=64, help="the most pictures to read")
    parser.add_argument("--clip", type=Path, help="video for the pipeline")
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry", action="store_true", help="without a GPU; times mean nothing")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments, Path(scratch))
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(as_table(results))


if __name__ == "__main__":
    main()
