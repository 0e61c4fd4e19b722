"""The command ``maskcast build``."""

from __future__ import annotations

import re
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from maskcast.builder.extra import builder_extra
from maskcast.engines.errors import InputError

_INPUT, _MODEL, _OUTPUT = "Input", "Model", "Output"
EXAMPLES = (
    "maskcast build runs/person/model.pth --size 512 --out person",
    "maskcast build person --precision int8 --calibration photos/ --out person-int8",
    "maskcast build default --backend tensorrt_rtx --size 256x448 --out person-gpu",
)


class Backend(StrEnum):
    """Engine that runs a bundle."""

    openvino = "openvino"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, bundle, default, or name like maskrcnn_resnet50_fpn_v2/COCO_V1.",
        ),
    ],
    *,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", rich_help_panel=_INPUT, help="Calibration images for int8."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|A,B,C",
            rich_help_panel=_MODEL,
            show_default="the model's",
            help="Class names, without background.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_MODEL,
            show_default="the bundle's, else 800x1344",
            help="Input HEIGHTxWIDTH or longest side, multiples of 32.",
        ),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SCORE",
            rich_help_panel=_MODEL,
            show_default="the bundle's, else 0.5",
            help="Minimum score.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", rich_help_panel=_OUTPUT, help="Folder of the bundle.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_OUTPUT,
            show_default="FOLDER",
            help="Name of the model.",
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(rich_help_panel=_OUTPUT, help="Engine that runs the bundle.")
    ] = Backend.openvino,
    precision: Annotated[
        str,
        typer.Option(
            metavar="PRECISION",
            rich_help_panel=_OUTPUT,
            help="Number format: fp32, int8, bf16 (OpenVINO), fp16 (TensorRT).",
        ),
    ] = "fp32",
    fp16_weights: Annotated[
        bool,
        typer.Option("--fp16-weights", rich_help_panel=_OUTPUT, help="Store weights as float16."),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            rich_help_panel="TensorRT",
            show_default="1",
            help="Maximum number of images per batch.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            rich_help_panel="TensorRT",
            show_default="the local GPU's",
            help="Compute capability to build for; repeatable.",
        ),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel="TensorRT",
            help="Write a Triton model repository too.",
        ),
    ] = None,
) -> None:
    """Build a bundle, a model ready to run, from a checkpoint or another bundle."""
    with builder_extra():
        from maskcast.builder.build import build as build_bundle
    from rich.console import Console

    from maskcast.builder.console import build_progress, print_bundle, print_plan

    if triton is not None:
        with builder_extra():
            from maskcast.builder.tensorrt.triton import check_triton, write_repository
        check_triton(backend.value)
    started = time.monotonic()
    console = Console(stderr=True)
    # A checkpoint needs torch, a bundle does not.
    with build_progress(console) as report, builder_extra():
        bundle = build_bundle(
            source,
            out,
            backend=backend.value,
            precision=precision,
            size=None if size is None else parse_size(size),
            name=name,
            labels=None if labels is None else read_labels(labels),
            fp16_weights=fp16_weights,
            score_threshold=score_threshold,
            calibration=calibration,
            max_batch=batch,
            capabilities=compute_capability or (),
            report=report,
            on_plan=lambda graph, built: print_plan(console, graph, built),
        )
    if triton is not None:
        write_repository(bundle, triton)
    print_bundle(console, bundle, time.monotonic() - started)
    typer.echo(bundle.path)


def parse_size(text: str) -> tuple[int, int] | int:
    """Read HEIGHTxWIDTH, or one number.

    Raises:
        InputError: the text is neither.
    """
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise InputError(f"--size {text}: give HEIGHTxWIDTH, for example 800x1344, or one number")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def read_labels(text: str) -> tuple[str, ...]:
    """Read class names: the lines of a file, or a list with commas.

    Raises:
        InputError: the file cannot be read.
    """
    if "," not in text and Path(text).exists():
        try:
            names = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(
                f"--labels {text}: not a readable UTF-8 file; give one with a name on each line"
            ) from None
        while names and not names[-1].strip():
            names.pop()
    else:
        names = text.split(",")
    return tuple(name.strip() for name in names)
