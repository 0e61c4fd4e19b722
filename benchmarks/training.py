"""Measure a training step on the CPU, with and without the optimisations over torchvision.

Run: ``python -m benchmarks.training [--repeat N] [--batch N] [--json]``.

A step of the default network by its recipe (bfloat16, squares of 384 pixels) has forward and
backward pass and optimizer. The images are drawn, with as many and as large ellipses as there are
people in photographs. The variants alternate; medians are reported. Loading and augmenting images
is done by another process and not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from msgspec.structs import replace
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import maskcast.builder.training.train as training
from maskcast.builder.training.config import TrainConfig
from maskcast.builder.training.recipe import recipe_by_name

SIDE = 384
PEOPLE = 6


def draw_batch(
    count: int, rng: np.random.Generator
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Make images of noise with ``PEOPLE`` ellipses each, and their targets."""
    images, targets = [], []
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(count):
        image = rng.random((3, SIDE, SIDE), np.float32)
        width, height = rng.uniform(20, 90, PEOPLE), rng.uniform(40, 180, PEOPLE)
        x, y = rng.uniform(50, SIDE - 50, PEOPLE), rng.uniform(95, SIDE - 95, PEOPLE)
        masks = np.stack(
            [
                ((columns - x[i]) / width[i] * 2) ** 2 + ((rows - y[i]) / height[i] * 2) ** 2 < 1
                for i in range(PEOPLE)
            ]
        )
        image[:, masks.any(axis=0)] *= 0.3
        boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        images.append(torch.from_numpy(image))
        targets.append(
            {
                "boxes": torch.from_numpy(boxes.astype(np.float32)),
                "labels": torch.ones(PEOPLE, dtype=torch.int64),
                "masks": torch.from_numpy(masks.astype(np.uint8)),
            }
        )
    return images, targets


@contextmanager
def torchvision_pooling() -> Iterator[None]:
    """Pool regions with torchvision's own RoIAlign."""
    with mock.patch(
        "maskcast.builder.training.losses.pool_regions",
        lambda pooler, *arguments: pooler(*arguments),
    ):
        yield


@contextmanager
def depthwise_in_bfloat16() -> Iterator[None]:
    """Let every convolution compute in bfloat16."""
    with mock.patch("maskcast.builder.network.backbone._is_slow_in_bfloat16", return_value=False):
        yield


@contextmanager
def both_changes() -> Iterator[None]:
    """Make both changes."""
    with torchvision_pooling(), depthwise_in_bfloat16():
        yield


@contextmanager
def unchanged() -> Iterator[None]:
    """Change nothing."""
    yield


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": unchanged,
    "torchvision's RoIAlign": torchvision_pooling,
    "depthwise convolutions in bfloat16": depthwise_in_bfloat16,
    "both": both_changes,
}


def make_run(folder: Path, batch: int) -> Any:
    """Make a training run of the default network, from the bundled weights."""
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    image = {"id": 1, "file_name": "image.png", "width": 64, "height": 64}
    content = {
        "images": [{**image, "id": index} for index in range(batch)],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    config = TrainConfig(
        output=folder / "run",
        images=folder,
        annotations=folder / "annotations.json",
        network="lite0-fpn",
        recipe=replace(recipe_by_name("lite-cpu"), batch_size=batch),
        initial=Path("default"),
    )
    return training._Run(config, Console(stderr=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    batches = [draw_batch(options.batch, np.random.default_rng(seed)) for seed in range(3)]
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), options.batch)
        for number in range(-1, options.repeat):  # the first does not count
            for name, variant in VARIANTS.items():
                images, targets = batches[number % len(batches)]
                with variant():
                    started_s = time.perf_counter()
                    run.step(images, targets)
                    took_s = time.perf_counter() - started_s
                if number >= 0:
                    times[name].append(1000 * took_s / options.batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    if options.json:
        print(json.dumps(medians))
        return
    table = Table("step", "ms per image", "times as long")
    for name, median_ms in medians.items():
        table.add_row(name, f"{median_ms:.0f}", f"{median_ms / medians['as it is']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
