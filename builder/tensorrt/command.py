"""``maskcast build --backend tensorrt``: from a checkpoint or a bundle, with a bar and a report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from maskcast.builder.build import build
from maskcast.builder.images import read_calibration_images
from maskcast.builder.tensorrt.plans import Precision, rebuild
from maskcast.builder.tensorrt.process import Built
from maskcast.engines.bundle import Bundle, FixedInput, is_bundle, open_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.plan import Package

_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
_PACKAGES: dict[str, Package] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"}


def build_for_tensorrt(
    checkpoint: str,
    out: Path,
    *,
    package: str,
    precision: str,
    size: tuple[int, int] | int,
    name: str | None,
    fp16_weights: bool,
    max_batch: int,
    capabilities: Sequence[str],
    score_threshold: float | None,
    calibration: Path | None,
) -> Bundle:
    """Build a TensorRT bundle and say on standard error how it went.

    Args:
        checkpoint: a file or name as ``build`` takes it, or a bundle, or "default".
        out: the bundle's folder.
        package: "tensorrt" or "tensorrt_rtx".
        precision: "fp32", "fp16" or "int8".
        size: height and width of the network's input.
        name: of the model; kept from a bundle, by default.
        fp16_weights: store the portable graphs' weights in half the space.
        max_batch: the most pictures at once.
        capabilities: compute capabilities to build for.
        score_threshold: that a user gets who names none; kept from a bundle, by default.
        calibration: folder of pictures for int8.

    Raises:
        InputError: see ``maskcast.builder.tensorrt.plans.build_plans``.
    """
    if precision not in _PRECISIONS:
        raise InputError(f"precision {precision}: {package} computes in fp32, fp16 or int8")
    if isinstance(size, int):
        raise InputError(
            f"--size {size}: TensorRT builds for one size of the input: give HEIGHTxWIDTH"
        )
    images = () if calibration is None else read_calibration_images(calibration, FixedInput(*size))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        if is_bundle(checkpoint):
            bundle = open_bundle(checkpoint)
        else:
            with console.status("exporting"):
                bundle = build(
                    checkpoint,
                    Path(scratch) / out.name,
                    backend="onnxruntime",
                    size=size,
                    name=name,
                    fp16_weights=fp16_weights,
                )
        if score_threshold is not None:
            bundle = replace(
                bundle, manifest=replace(bundle.manifest, score_threshold=score_threshold)
            )
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("preparing", total=None)

            def report(phase: str, done: int, total: int) -> None:
                progress.update(bar, description=phase, completed=done, total=total)

            def built(graph: str, outcome: Built) -> None:
                memory_mb = outcome.peak_rss_bytes / 1e6
                console.print(
                    f"{graph}: {outcome.plan_bytes / 1e6:.1f} MB in {outcome.build_s:.1f} s, "
                    f"peak memory {memory_mb:.0f} MB, {package} {outcome.version}"
                )

            return rebuild(
                bundle,
                out,
                package=_PACKAGES[package],
                precision=_PRECISIONS[precision],
                size=size,
                calibration=images,
                max_batch=max_batch,
                capabilities=capabilities,
                report=report,
                built=built,
            )
