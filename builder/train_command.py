"""The command ``maskcast train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskcast.builder.extra import builder_extra
from maskcast.engines.errors import InputError

_INPUT, _MODEL, _TRAINING, _OUTPUT = "Input", "Model", "Training", "Output"
EXAMPLES = (
    "maskcast train --images photos/ --annotations train.json --out runs/mine",
    "maskcast train --images photos/ --keypoints poses.json --initial default --out runs/pose",
)


def train(
    *,
    images: Annotated[
        Path, typer.Option(metavar="FOLDER", rich_help_panel=_INPUT, help="Training images.")
    ],
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_INPUT,
            show_default="only keypoints",
            help="Annotations of the images, COCO JSON.",
        ),
    ] = None,
    box_annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_INPUT,
            help="Annotations of further images, without masks.",
        ),
    ] = None,
    predict_masks: Annotated[
        bool,
        typer.Option(
            "--predict-masks",
            rich_help_panel=_INPUT,
            help="Predict masks for --box-annotations with the initial model.",
        ),
    ] = False,
    keypoints: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_INPUT,
            show_default="none",
            help="Annotations of further images, with keypoints; repeatable.",
        ),
    ] = None,
    val_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_INPUT,
            show_default="--images",
            help="Validation images.",
        ),
    ] = None,
    val_annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_INPUT,
            show_default="none",
            help="Annotations of the validation images.",
        ),
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="PRESET", rich_help_panel=_MODEL, help="Network preset.")
    ] = "lite0-fpn",
    masks: Annotated[
        bool,
        typer.Option(rich_help_panel=_MODEL, help="Train Mask R-CNN, otherwise Faster R-CNN."),
    ] = True,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=_MODEL,
            show_default="ImageNet weights",
            help="Model to start from: checkpoint, bundle, default.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            rich_help_panel=_TRAINING,
            show_default="by network",
            help="Training recipe: paper, lite-cpu or lite-cpu-pose.",
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_TRAINING,
            show_default="the recipe's",
            help="Number of epochs.",
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_TRAINING,
            help="Number of iterations, instead of epochs.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            rich_help_panel=_TRAINING,
            help="Duration of the run, instead of epochs.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_TRAINING,
            show_default="the recipe's",
            help="Images per iteration; learning rate is not scaled.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            rich_help_panel=_TRAINING,
            show_default="the recipe's",
            help="Peak learning rate.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", rich_help_panel=_TRAINING, help="Processes that load images."
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=_TRAINING, help="Random seed.")
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_OUTPUT,
            help="Folder of the run; an interrupted run is resumed.",
        ),
    ],
) -> None:
    """Train a network on COCO annotations.

    --keypoints adds a branch that finds keypoints. With --annotations the whole network is trained,
    also on the keypoints in those files and in --box-annotations. Without --annotations only the
    keypoint branch is trained, on the features of --initial; the rest of the model does not change.

    Ctrl-C saves the run and ends it with exit code 130; the same command resumes it.
    """
    with builder_extra():
        from msgspec.structs import replace

        from maskcast.builder.training.config import TrainConfig
        from maskcast.builder.training.recipe import recipe_by_name
        from maskcast.builder.training.train import train as train_network

    lite = "lite-cpu" if annotations is not None else "lite-cpu-pose"
    chosen = recipe_by_name(recipe or (lite if network.startswith("lite") else "paper"))
    if sum(length is not None for length in (epochs, iterations, minutes)) > 1:
        raise InputError(
            "--epochs, --iterations, --minutes: each sets the length of the run; give one"
        )
    changes = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    chosen = replace(chosen, **{key: value for key, value in changes.items() if value is not None})
    path = train_network(
        TrainConfig(
            output=out,
            images=images,
            annotations=annotations,
            network=network,
            recipe=chosen,
            with_masks=masks,
            box_annotations=box_annotations,
            predict_masks=predict_masks,
            keypoint_annotations=tuple(keypoints or ()),
            validation_images=val_images,
            validation_annotations=val_annotations,
            initial=initial,
            iterations=iterations,
            minutes=minutes,
            workers=workers,
            seed=seed,
        )
    )
    if path is None:
        raise typer.Exit(130)
    typer.echo(f"build a bundle with: maskcast build {path} --out FOLDER", err=True)
    typer.echo(path)
