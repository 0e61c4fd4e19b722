"""Scenes with known identities: cut-out people move, cross, hide each other, leave and return.

Frames are 854 x 480 at 25 per second. The ground truth of a frame is the visible part of each
person.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.masks import MASK_SIZE

WIDTH, HEIGHT, FPS = 854, 480, 25
FRAMES = 300
MIN_VISIBLE = 0.15
"""Share of a person that must be visible to be part of the ground truth."""


class Truth(NamedTuple):
    """Ground truth of a frame: ids ``[N]``, boxes ``[N, 4]`` xyxy, box-sized masks, shares ``[N]``.

    Boxes and masks are those of the visible parts; a share is the visible part of a person, 0..1.
    """

    ids: NDArray[np.int64]
    boxes: NDArray[np.float32]
    masks: list[NDArray[np.bool_]]
    shares: NDArray[np.float64]


@dataclass
class Person:
    """A cut-out and its ``path``: the x and y of its feet in each frame, NaN while away."""

    image: Image.Image
    path: NDArray[np.float64]


def silhouettes(seed: int, count: int) -> list[Image.Image]:
    """Draw figures with a head, a body and legs, RGBA, 300 pixels high, of varied proportions."""
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(count):
        wide = int(rng.integers(90, 150))
        image = Image.new("RGBA", (wide, 300))
        pen = ImageDraw.Draw(image)
        middle, head = wide / 2, rng.uniform(18, 26)
        shirt, legs, skin = (tuple(rng.integers(30, 226, 3).tolist()) for _ in range(3))
        gap, hip = rng.uniform(4, 20), rng.uniform(150, 180)
        pen.rounded_rectangle([wide * 0.12, 48, wide * 0.88, hip], 20, fill=shirt)
        for side in (-1, 1):
            x = middle + side * (gap / 2 + wide * 0.13)
            pen.rectangle([x - wide * 0.12, hip - 8, x + wide * 0.12, 300], fill=legs)
        pen.ellipse([middle - head, 0, middle + head, 2.2 * head], fill=skin)
        figures.append(image)
    return figures


def cut_outs(folder: Path, count: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Cut whole people out of photographs with COCO annotations; return them and backgrounds.

    Args:
        folder: folder with ``instances_val.json`` and ``images/``.
        count: maximum number of people.
    """
    coco = json.loads((folder / "instances_val.json").read_text())
    photographs = {photo["id"]: photo for photo in coco["images"]}
    people, crowded = [], set()
    for found in sorted(coco["annotations"], key=lambda one: -one["area"]):
        crowded.add(found["image_id"])
        photo = photographs[found["image_id"]]
        x, y, wide, high = found["bbox"]
        inside = (
            x > 2 and y > 2 and x + wide < photo["width"] - 2 and y + high < photo["height"] - 2
        )
        standing = high > 150 and 1.6 < high / max(wide, 1) < 4
        if found["iscrowd"] or not inside or not standing or found["area"] < 0.35 * wide * high:
            continue
        image = Image.open(folder / "images" / photo["file_name"]).convert("RGB")
        alpha = Image.new("L", image.size)
        for ring in found["segmentation"]:
            ImageDraw.Draw(alpha).polygon(ring, fill=255)
        image.putalpha(alpha)
        people.append(image.crop((int(x), int(y), int(x + wide) + 1, int(y + high) + 1)))
    empty = [photo for photo in coco["images"] if photo["id"] not in crowded]
    backgrounds = [
        Image.open(folder / "images" / photo["file_name"]).convert("RGB") for photo in empty[:40]
    ]
    return people[:count], backgrounds


class Scene:
    """A sequence of frames.

    Args:
        seed: random seed of the whole scene.
        figures: cut-outs to choose from, RGBA.
        backgrounds: images to choose from; if empty, the background is plain.
    """

    def __init__(
        self, seed: int, figures: list[Image.Image], backgrounds: list[Image.Image]
    ) -> None:
        rng = np.random.default_rng(seed)
        people = int(rng.integers(4, 9))
        chosen = rng.choice(len(figures), people, replace=len(figures) < people)
        self.people = [_make_person(figures[k], rng) for k in chosen]
        plain = Image.new("RGB", (WIDTH, HEIGHT), (96, 104, 112))
        self.background = (
            backgrounds[int(rng.integers(len(backgrounds)))].resize((WIDTH, HEIGHT))
            if backgrounds
            else plain
        )
        left = int(rng.integers(200, 600))
        self.pillar = (left, left + int(rng.integers(30, 80)))

    def truth(self, index: int) -> Truth:
        """Return the ground truth of a frame."""
        taken = np.zeros((HEIGHT, WIDTH), np.bool_)
        taken[:, slice(*self.pillar)] = True
        ids, boxes, masks, shares = [], [], [], []
        for number, corner in self._front_to_back(index):
            alpha = np.asarray(self.people[number].image.getchannel("A")) > 127
            x0, y0 = corner
            own = np.zeros_like(taken)
            top, left = max(y0, 0), max(x0, 0)
            part = alpha[top - y0 : HEIGHT - y0, left - x0 : max(WIDTH - x0, 0)]
            own[top : top + part.shape[0], left : left + part.shape[1]] = part
            visible = own & ~taken
            taken |= own
            share = visible.sum() / alpha.sum()
            if share < MIN_VISIBLE:
                continue
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            ids.append(number + 1)
            boxes.append(box)
            masks.append(visible[box[1] : box[3], box[0] : box[2]])
            shares.append(share)
        return Truth(
            np.array(ids, np.int64),
            np.array(boxes, np.float32).reshape(-1, 4),
            masks,
            np.array(shares),
        )

    def image(self, index: int) -> Image.Image:
        """Render a frame, RGB."""
        image = self.background.copy()
        for number, corner in reversed(list(self._front_to_back(index))):
            figure = self.people[number].image
            image.paste(figure, corner, figure)
        left, right = self.pillar
        image.paste((58, 54, 50), (left, 0, right, HEIGHT))
        return image

    def _front_to_back(self, index: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield each person in the frame, nearest first, with the corner of its cut-out."""
        order = sorted(
            (n for n in range(len(self.people)) if not np.isnan(self.people[n].path[index, 0])),
            key=lambda n: -self.people[n].path[index, 1],
        )
        for number in order:
            x, y = self.people[number].path[index]
            image = self.people[number].image
            yield number, (round(x - image.width / 2), round(y - image.height))


def _make_person(figure: Image.Image, rng: np.random.Generator) -> Person:
    """Scale a figure and give it a path through the frame, with stops, turns and returns."""
    high = int(rng.uniform(150, 300))
    image = figure.resize((max(round(figure.width * high / figure.height), 8), high))
    half = image.width / 2
    path = np.full((FRAMES, 2), np.nan)
    heading = 1.0 if rng.random() < 0.5 else -1.0
    x = (
        rng.uniform(0.1, 0.9) * WIDTH
        if rng.random() < 0.3
        else (-half if heading > 0 else WIDTH + half)
    )
    feet, pace, phase = rng.uniform(high + 10, HEIGHT - 5), rng.uniform(40, 170), rng.uniform(0, 6)
    waits = rng.uniform(0, 3)
    speed = 0.0
    for index in range(FRAMES):
        time_s = index / FPS
        if time_s < waits:  # standing, or away
            wanted = 0.0
        else:
            wanted = heading * pace
            chance = rng.random()
            if chance < 0.004:
                heading = -heading
            elif chance < 0.009:
                waits = time_s + rng.uniform(0.4, 1.5)
        speed += np.clip(wanted - speed, -200 / FPS, 200 / FPS)
        x += speed / FPS
        if not -half <= x <= WIDTH + half:
            heading = 1.0 if x < 0 else -1.0
            x, speed = float(np.clip(x, -half, WIDTH + half)), 0.0
            waits = time_s + rng.uniform(0.5, 3)
        bob = 0.008 * high * np.sin(2 * np.pi * 1.8 * time_s + phase) * (abs(speed) > 5)
        path[index] = x, feet + bob
    return Person(image, path)


def simulate_detections(truth: Truth, rng: np.random.Generator) -> Instances:
    """Make instances as a detector of medium quality reports them, with scores from 0.5.

    The less of a person is visible, the lower its score and the more likely it is missed. Boxes are
    off by a few percent, masks by a few cells, and sometimes there is a false alarm.
    """
    boxes, scores, crops = [], [], []
    for box, mask, share in zip(truth.boxes, truth.masks, truth.shares, strict=True):
        score = 0.55 + 0.42 * min(1.0, 1.25 * share) + rng.normal(0, 0.05)
        if score < 0.5 or rng.random() > 0.97 * min(1.0, 0.35 + share):
            continue
        sides = np.tile(box[2:] - box[:2], 2)
        noisy = box + rng.normal(0, 0.02, 4) * sides
        noisy = np.clip(noisy, 0, [WIDTH, HEIGHT] * 2)
        if (noisy[2:] - noisy[:2] < 4).any():
            continue
        place = noisy - np.tile(box[:2], 2)
        image = Image.fromarray(mask.astype(np.uint8) * 255)
        crop = image.transform(
            (MASK_SIZE, MASK_SIZE),
            Image.Transform.EXTENT,
            tuple(place.tolist()),
            Image.Resampling.BILINEAR,
        )
        boxes.append(noisy)
        scores.append(min(score, 0.999))
        crops.append(np.clip(np.asarray(crop) + rng.normal(0, 40, (MASK_SIZE, MASK_SIZE)), 0, 255))
    if rng.random() < 0.04:
        corner = rng.uniform(0, 1, 2) * [WIDTH - 100, HEIGHT - 200]
        boxes.append(np.concatenate([corner, corner + rng.uniform(40, 200, 2) * [0.5, 1]]))
        scores.append(rng.uniform(0.5, 0.7))
        axis = np.linspace(-1, 1, MASK_SIZE)
        crops.append(255.0 * (axis[:, None] ** 2 + axis[None] ** 2 < 0.9))
    order = np.argsort(scores)[::-1] if scores else np.zeros(0, np.int64)
    return Instances(
        WIDTH,
        HEIGHT,
        np.array(boxes, np.float32).reshape(-1, 4)[order],
        np.array(scores, np.float32)[order],
        np.ones(len(order), np.int32),
        np.array(crops).astype(np.uint8).reshape(-1, MASK_SIZE, MASK_SIZE)[order],
    )
