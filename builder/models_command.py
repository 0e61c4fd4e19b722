"""The command ``maskcast models``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from maskcast.builder.extra import builder_extra
from maskcast.engines.errors import InputError

EXAMPLES = ("maskcast models", "maskcast models bundles/")


def models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER...", help="List the bundles in these folders too."),
    ] = None,
) -> None:
    """List the models that can be run, built and trained.

    The names go with `maskcast run --model`, `maskcast build` and `maskcast train --network`.
    """
    from maskcast.engines.bundle import DEFAULT  # not at the top: it loads numpy, --help needs none

    rows = [("run", *_describe_bundle(DEFAULT))]
    for folder in folders or ():
        rows += [("run", *_describe_bundle(str(path))) for path in _bundles(folder)]
    hint = ""
    try:
        with builder_extra():
            rows += [("build", *row) for row in _checkpoints()]
            rows += [("train", *row) for row in _networks()]
    except InputError:
        hint = "to see what can be built and trained: pip install 'maskcast[builder]'"
    width = max(len(name) for _, name, _ in rows)
    for purpose, name, text in rows:
        typer.echo(f"{purpose:5}  {name:{width}}  {text}")
    if hint:
        typer.echo(hint, err=True)


def _bundles(folder: Path) -> list[Path]:
    from maskcast.engines.bundle import is_bundle

    if is_bundle(folder):
        return [folder]
    try:
        found = sorted(path for path in folder.iterdir() if is_bundle(path))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{folder}: contains no bundle; give a bundle or a folder of bundles")
    return found


def _describe_bundle(name: str) -> tuple[str, str]:
    from maskcast.engines.bundle import LongestSideInput, open_bundle

    try:
        manifest = open_bundle(name).manifest
    except InputError as error:
        return name, f"damaged: {str(error).removeprefix(f'{name}: ')}"
    size = manifest.input
    pixels = (
        f"longer side {size.longest_side}"
        if isinstance(size, LongestSideInput)
        else f"{size.height}x{size.width}"
    )
    parts = {"boxes": True, "masks": manifest.graphs.segmenter, "keypoints": manifest.graphs.poser}
    labels = manifest.labels[1:]
    shown = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
    found = ", ".join(part for part, is_there in parts.items() if is_there)
    return name, (
        f"{manifest.name}: {shown} ({found}), {pixels} pixels, "
        f"{manifest.precision} for {manifest.backend}"
    )


def _checkpoints() -> Iterator[tuple[str, str]]:
    from torchvision.models import get_model_weights

    from maskcast.builder.checkpoint.checkpoint import TORCHVISION

    for name, preset in TORCHVISION.items():
        model, version = name.split("/")
        meta = get_model_weights(model)[version].meta
        classes = len({*meta["categories"]} - {"__background__", "N/A"})
        yield name, f"{preset}, {classes} classes, downloads {meta['_file_size']:.0f} MB"
    yield "FILE", "a checkpoint of maskcast, torchvision or detectron2, or a bundle"


def _networks() -> Iterator[tuple[str, str]]:
    from maskcast.builder.network.network import PRESETS, network_config

    for preset in PRESETS:
        config = network_config(preset, ())
        sides = f"sides {config.min_size} to {config.max_size}"
        if config.min_size == config.max_size:
            sides = f"longer side {config.max_size}"
        yield (
            preset,
            f"{config.backbone}, pyramid of {config.fpn_channels} channels, {sides} pixels",
        )
