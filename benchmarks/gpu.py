"""Measure maskcast on a GPU in one command: build, parity, time, memory, power.

Run: ``python -m benchmarks.gpu [--model default|COCO_V1|FILE] [--size HxW] [--images FOLDER]
[--clip FILE] [--out gpu.json]``.

Every precision is built and run on the same images. The reference is eager torch in float32 without
TF32, on the same GPU. int8 is calibrated on half of the images; all precisions are compared on the
other half. Times are medians of synchronous calls, after warm-up has become stable, for fixed
numbers of boxes, so that they do not depend on the images; a poser is timed where the bundle has
one. The JSON is written after every step; a step that fails is recorded and the next one runs.
``--dry`` does the same without a GPU: plans are built for the usual cards but not run, OpenVINO
stands in for the engine and the CPU for torch's device; its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace as replace_struct
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_parity import open_model, parity, read_images, run_torch
from benchmarks.gpu_report import Report
from maskcast.builder.build import build
from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections, Engine
from maskcast.engines.image import NetworkImage
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.pipeline import Pipeline

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "int8")
PUBLISHED_MS = {
    "NVIDIA's detectron2 sample, A5000, 1344x1344": {"fp32": 25.9, "fp16": 13.0, "int8": 7.3},
    "mmdeploy, T4, 800x1344": {"fp32": 104.8, "fp16": 58.3},
    "torchvision, V100, pasting": {"fp32": 90.3},
    "detectron2, V100": {"fp32": 43.0},
    "the paper, M40": {"fp32": 195.0},
}
"""Published figures for other cards; they were not measured again."""

BOX_COUNTS = (1, 8, 100)
"""Numbers of boxes per image that the segmenter is timed with."""

_SMI = "name,driver_version,power.draw,memory.used,clocks.sm"


def median_ms(run: Callable[[], Any], repeat: int) -> float:
    """Time a synchronous call: median of ``repeat``."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def settle(run: Callable[[], Any], limit_s: float, window: int = 20) -> dict[str, Any]:
    """Call until the median of a window is within 5 % of that of the window before.

    Kernels are compiled and clocks rise in the background; times before that is over mean nothing.

    Returns:
        ``calls``, ``seconds``, and whether it became ``stable`` within ``limit_s``.
    """
    start, calls, before = time.perf_counter(), 0, 0.0  # 0.0: no window yet
    while time.perf_counter() - start < limit_s:
        now = median_ms(run, window)
        calls += window
        if abs(now - before) <= 0.05 * before:
            return {"calls": calls, "seconds": time.perf_counter() - start, "stable": True}
        before = now
    return {"calls": calls, "seconds": time.perf_counter() - start, "stable": False}


def with_boxes(detections: Detections, count: int) -> Detections:
    """Return detections with ``count`` boxes of all sizes inside every image of a batch."""
    images = detections.images
    height, width = images[0].pixels.shape[:2]
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.5, (len(images) * count, 2))
    sides = rng.uniform(0.02, 0.5, corner.shape)
    boxes = np.concatenate([corner, corner + sides], 1) * [width, height, width, height]
    return replace(
        detections,
        boxes=boxes.astype(np.float32),
        scores=np.ones(len(boxes), np.float32),
        labels=np.ones(len(boxes), np.int32),
        image_index=np.repeat(np.arange(len(images), dtype=np.int32), count),
    )


def time_engine(engine: Engine, image: NetworkImage, repeat: int, limit_s: float) -> dict[str, Any]:
    """Time detection, and masks and poses of fixed numbers of boxes, for batches 1, 2, 4, ..."""
    results: dict[str, Any] = {}
    batch = 1
    while batch <= engine.max_batch:
        images = [image] * batch

        def detect(images: list[NetworkImage] = images) -> None:
            engine.detect(images, 1.1).release()

        warm_up = settle(detect, limit_s)
        timed: dict[str, Any] = {"warm_up": warm_up, "detect_ms": median_ms(detect, repeat)}
        for count in BOX_COUNTS:

            def both(images: list[NetworkImage] = images, count: int = count) -> None:
                engine.segment(with_boxes(engine.detect(images, 1.1), count))

            settle(both, limit_s)
            timed[f"total_ms_{count}_boxes"] = total = median_ms(both, repeat)
            timed[f"segment_ms_{count}_boxes"] = total - timed["detect_ms"]
            if engine.has_pose:

                def all_three(images: list[NetworkImage] = images, count: int = count) -> None:
                    found = with_boxes(engine.detect(images, 1.1), count)
                    engine.segment(engine.estimate_pose(found))

                settle(all_three, limit_s)
                timed[f"pose_ms_{count}_boxes"] = median_ms(all_three, repeat) - total
        timed["images_per_s_8_boxes"] = 1000 * batch / timed["total_ms_8_boxes"]
        results[str(batch)] = timed
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


def time_torch(network: Any, image: NetworkImage, device: str, repeat: int) -> float:
    """Time torch, in milliseconds per image."""
    settle(lambda: run_torch(network, image, device), 5.0, window=min(repeat, 5))
    return median_ms(lambda: run_torch(network, image, device), repeat)


def time_compiled(network: Any, image: NetworkImage, device: str, repeat: int) -> float:
    """Time torch with a compiled backbone; needs a C compiler and Python's headers."""
    plain = network.backbone
    network.backbone = torch.compile(plain)
    try:
        return time_torch(network, image, device, repeat)
    finally:
        network.backbone = plain


def gpu_state() -> dict[str, str] | None:
    """Ask nvidia-smi for name, driver, power and memory; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    values = (value.strip() for value in line.splitlines()[0].split(","))
    return dict(zip(_SMI.split(","), values, strict=True))


def run(arguments: argparse.Namespace, scratch: Path) -> Report:
    """Build and measure every precision; then torch."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    height, _, width = arguments.size.partition("x")
    size = int(height), int(width)
    device = "cpu" if arguments.dry else "cuda"
    bundle, network = open_model(arguments.model, scratch, size)
    network.to(device)
    images = read_images(arguments.images, size, arguments.count)
    calibration, compared = images[: len(images) // 2], images[len(images) // 2 :]
    report = Report(
        arguments.out,
        dry=arguments.dry,
        model=arguments.model,
        size=arguments.size,
        gpu=gpu_state(),
        published_ms=PUBLISHED_MS,
        torch={},
        precisions={},
    )
    for precision in arguments.precision or PRECISIONS:
        measured: dict[str, Any] = {"built": {}}
        report.results["precisions"][precision] = measured
        measure(
            report, measured, precision, arguments, scratch, bundle, network, calibration, compared
        )
    repeat, timed = arguments.repeat, report.results["torch"]
    report.step(timed, "eager_ms", lambda: time_torch(network, compared[0], device, repeat))
    if not arguments.dry:  # last, so that it cannot affect the other steps
        report.step(
            timed, "compiled_ms", lambda: time_compiled(network, compared[0], device, repeat)
        )
    return report


def measure(
    report: Report,
    measured: dict[str, Any],
    precision: str,
    arguments: argparse.Namespace,
    scratch: Path,
    bundle: Bundle,
    network: Any,
    calibration: Sequence[NetworkImage],
    compared: Sequence[NetworkImage],
) -> None:
    """Build one precision and measure it, each step into ``measured``."""
    device = "cpu" if arguments.dry else "cuda"
    height, _, width = arguments.size.partition("x")

    def make() -> dict[str, Any]:
        made = build(
            bundle.path,
            scratch / precision,
            backend=arguments.package,
            precision=precision,
            size=(int(height), int(width)),
            max_batch=arguments.batch,
            calibration=calibration if precision == "int8" else None,
            on_plan=lambda name, built: report.step(
                measured["built"], name, lambda: msgspec.to_builtins(built)
            ),
        )
        start = time.perf_counter()
        opened.append(open_engine(made, dry=arguments.dry))
        return {"load_s": time.perf_counter() - start}

    opened: list[Engine] = []
    report.step(measured, "loaded", make)
    if not opened:
        return
    engine, score = opened[0], bundle.manifest.score_threshold
    report.step(measured, "parity", lambda: parity(engine, network, compared, device, score))
    report.step(
        measured,
        "time",
        lambda: time_engine(engine, compared[0], arguments.repeat, arguments.settle),
    )
    if arguments.clip:
        report.step(measured, "pipeline", lambda: time_pipeline(engine, arguments.clip))
    report.step(measured, "gpu", gpu_state)  # power and memory directly after the work
    report.step(measured, "closed", lambda: engine.close())


def open_engine(bundle: Bundle, *, dry: bool) -> Engine:
    """Open the engine that is measured: TensorRT's, or OpenVINO's in its place."""
    if dry:
        portable = Bundle(bundle.path, replace_struct(bundle.manifest, precision="fp32"))
        return OpenVinoEngine(portable, pose=bundle.poser is not None)
    from maskcast.engines.tensorrt.engine import TensorRTEngine

    return TensorRTEngine(bundle, pose=bundle.poser is not None)


def as_table(results: dict[str, Any]) -> Table:
    """Format the results as a table."""
    gpu = results["gpu"] or {"name": "no GPU"}
    title = f"{results['model']} {results['size']} on {gpu['name']}"
    if results["dry"]:
        title += " (dry run on the CPU: its times mean nothing)"
    table = Table("", "ms", "images/s", "matched", "IoU", "plan MB", "build s", title=title)
    for name, value in results["torch"].items():
        table.add_row(f"torch {name.removesuffix('_ms')}", f"{value:.2f}", f"{1000 / value:.1f}")
    for precision, measured in results["precisions"].items():
        plans = measured["built"].values()
        found = measured.get("parity") or {"matched": "-", "torch": "-", "iou_mean": 0.0}
        for batch, timed in (measured.get("time") or {}).items():
            table.add_row(
                f"{precision}, batch {batch}, 8 boxes per image",
                f"{timed['total_ms_8_boxes']:.2f}",
                f"{timed['images_per_s_8_boxes']:.1f}",
                f"{found['matched']}/{found['torch']}",
                f"{found['iou_mean']:.3f}",
                f"{sum(plan['plan_bytes'] for plan in plans) / 1e6:.1f}",
                f"{sum(plan['build_s'] for plan in plans):.1f}",
            )
    for step, reason in results["failed"].items():
        table.add_row(f"failed: {step}", reason)
    table.add_section()
    for name, figures in results["published_ms"].items():
        for precision, value in figures.items():
            table.add_row(f"{name}, {precision}", f"{value:.1f}", f"{1000 / value:.1f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; exit with 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="default", help="default, or a checkpoint")
    parser.add_argument("--size", default="288x512", help="HEIGHTxWIDTH of the network's input")
    parser.add_argument("--batch", type=int, default=4, help="maximum number of images per batch")
    parser.add_argument("--package", default="tensorrt_rtx", choices=("tensorrt", "tensorrt_rtx"))
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only this one")
    parser.add_argument("--images", type=Path, help="folder of images; noise by default")
    parser.add_argument("--count", type=int, default=64, help="maximum number of images to read")
    parser.add_argument("--clip", type=Path, help="video for the pipeline")
    parser.add_argument("--repeat", type=int, default=50, help="calls of each timing")
    parser.add_argument("--settle", type=float, default=30.0, help="maximum seconds of warm-up")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry", action="store_true", help="run without a GPU; times mean nothing")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments, Path(scratch)).results
    Console().print(as_table(results))
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
