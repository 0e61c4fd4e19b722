"""The offline commands: build, train, eval.

They need the builder extra; importing this module does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from maskcast.engines.errors import InputError

_ROOMS = ("maskcast",)


class Backend(StrEnum):
    """What a bundle is built for."""

    openvino = "openvino"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(build)
    app.command()(train)
    app.command("eval")(evaluate)


def build(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A file; torchvision's maskrcnn_resnet50_fpn_v2/COCO_V1 and its like; or a "
            "bundle, or default, to make another one of it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The bundle's folder.")],
    backend: Annotated[Backend, typer.Option(help="What will run it.")] = Backend.openvino,
    precision: Annotated[
        str,
        typer.Option(
            help="What it computes in: fp32, bf16 or int8; with TensorRT fp32, fp16, int8."
        ),
    ] = "fp32",
    size: Annotated[
        str | None,
        typer.Option(
            help="The network's input, HEIGHTxWIDTH; or LONGEST, one side, to follow the shape of "
            "the pictures. Multiples of 32. By default the bundle's own, or 800x1344."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's; by default the folder's.")] = None,
    fp16_weights: Annotated[
        bool, typer.Option("--fp16-weights", help="Store the weights in half the space.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, max=64, help="TensorRT: the most pictures at once.")
    ] = 1,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="TensorRT-RTX: cards to build for, as 8.6; by default the one here."),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="What scores less is not shown; by default the bundle's own, or 0.5."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="int8: folder of pictures like yours, to find ranges with.")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle: a folder with a model that is ready to run."""
    shape = None if size is None else parse_size(size)
    if backend is Backend.tensorrt or backend is Backend.tensorrt_rtx:
        with _builder_extra():
            from maskcast.builder.build import PAPER_SIZE
            from maskcast.builder.tensorrt.command import build_for_tensorrt
        built = build_for_tensorrt(
            checkpoint,
            out,
            package=backend.value,
            precision=precision,
            size=PAPER_SIZE if shape is None else shape,
            name=name,
            fp16_weights=fp16_weights,
            max_batch=batch,
            capabilities=compute_capability or (),
            score_threshold=score_threshold,
            calibration=calibration,
        )
        typer.echo(built.path)
        return
    with _builder_extra():
        from maskcast.builder.build import build as build_bundle
    from rich.console import Console

    # What is wrapped needs torch for a checkpoint, and not for a bundle.
    with Console(stderr=True).status("building"), _builder_extra():
        bundle = build_bundle(
            checkpoint,
            out,
            backend="openvino" if backend is Backend.openvino else "onnxruntime",
            precision=precision,
            size=shape,
            name=name,
            fp16_weights=fp16_weights,
            score_threshold=score_threshold,
            calibration=calibration,
        )
    typer.echo(bundle.path)


def parse_size(text: str) -> tuple[int, int] | int:
    """Read HEIGHTxWIDTH, or one number.

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise InputError(f"--size {text}: give HEIGHTxWIDTH, for example 800x1344, or one number")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def train(
    images: Annotated[Path, typer.Option(help="Folder of the training pictures.")],
    annotations: Annotated[Path, typer.Option(help="Their instances, COCO's JSON.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on.")],
    network: Annotated[str, typer.Option(help="Preset of the network.")] = "lite0-fpn",
    recipe: Annotated[
        str | None,
        typer.Option(help="paper or lite-cpu; by default the one that suits the network."),
    ] = None,
    masks: Annotated[bool, typer.Option(help="Mask R-CNN, or Faster R-CNN.")] = True,
    box_annotations: Annotated[
        Path | None, typer.Option(help="More pictures of the same folder, with boxes alone.")
    ] = None,
    val_images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures to measure on; as --images.")
    ] = None,
    val_annotations: Annotated[
        Path | None, typer.Option(help="Their instances; without it nothing is measured.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="Checkpoint, bundle or default to start from, not ImageNet's weights."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Instead of epochs.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that load pictures.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a network on COCO annotations.

    Ctrl-C saves the run and ends with exit code 130; the same command goes on from there.
    """
    with _builder_extra():
        from msgspec.structs import replace

        from maskcast.builder.training.recipe import recipe_by_name
        from maskcast.builder.training.train import TrainConfig
        from maskcast.builder.training.train import train as train_network

    chosen = recipe_by_name(recipe or ("lite-cpu" if network.startswith("lite") else "paper"))
    if epochs is not None:
        chosen = replace(chosen, epochs=epochs)
    path = train_network(
        TrainConfig(
            output=out,
            images=images,
            annotations=annotations,
            network=network,
            recipe=chosen,
            with_masks=masks,
            box_annotations=box_annotations,
            validation_images=val_images,
            validation_annotations=val_annotations,
            initial=initial,
            minutes=minutes,
            workers=workers,
            seed=seed,
        )
    )
    if path is None:
        raise typer.Exit(130)
    typer.echo(path)


def evaluate(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, or default.")],
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    annotations: Annotated[Path, typer.Option(help="Their instances, COCO's JSON.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first pictures.")] = None,
) -> None:
    """Measure a bundle's accuracy on annotated images.

    Prints COCO's average precision of boxes and masks, and the precision, recall and false alarms
    per image at the bundle's score threshold, where a detection counts as right if its box overlaps
    an instance with an IoU of at least 0.5. Images without annotations count. Categories are
    matched by name; only those that the model knows are scored.
    """
    with _builder_extra():
        from maskcast.builder.evaluate import Prediction
        from maskcast.builder.evaluate import evaluate as evaluate_predictor
    from rich.console import Console
    from rich.progress import track

    from maskcast.engines.load import load_engine, predict

    engine = load_engine(bundle)
    label_names = engine.manifest.labels
    with_masks = engine.manifest.graphs.segmenter is not None

    def find(rgb: Any) -> Prediction:
        found = predict(engine, rgb, min_score=0.0)
        masks = [found.rle(i) for i in range(len(found))] if with_masks else None
        return Prediction(found.boxes, found.scores, found.labels, masks)

    def show(entries: list[Any]) -> Iterable[Any]:
        return track(entries, "measuring", console=Console(stderr=True), transient=True)

    try:
        scores = evaluate_predictor(
            find,
            images,
            annotations,
            tuple(label_names[1:]),
            with_masks=with_masks,
            threshold=engine.manifest.score_threshold,
            limit=limit,
            track=show,
        )
    finally:
        engine.close()
    if as_json:
        typer.echo(json.dumps(scores))
    else:
        _print_scores(scores)


def _print_scores(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    images = scores["images"]
    table = Table("", title=f"COCO average precision, percent, {images} images")
    kinds = {"bbox": "boxes", "segm": "masks"}
    for name in scores["bbox"]:
        table.add_column(name, justify="right")
    for kind, title in kinds.items():
        if kind in scores:
            figures = scores[kind].values()
            table.add_row(title, *(_percent(ap) for ap in figures))
    console.print(table)
    point = scores["at_threshold"]
    table = Table(title=f"At the bundle's threshold, {point['threshold']:g}, boxes")
    for name in ("precision %", "recall %", "false alarms per image"):
        table.add_column(name, justify="right")
    table.add_row(
        _percent(point["precision"]),
        _percent(point["recall"]),
        f"{point['false_per_image']:.3f}",
    )
    console.print(table)


def _percent(fraction: float | None) -> str:
    """Format a fraction; COCO's -1 and None mean that there was nothing to measure."""
    return "-" if fraction is None or fraction < 0 else f"{100 * fraction:.1f}"


@contextmanager
def _builder_extra() -> Iterator[None]:
    """Say what to install where a package of the builder extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _ROOMS:
            raise
        raise InputError(
            f"this command needs {package}, which is not installed: pip install 'maskcast[builder]'"
        ) from None
