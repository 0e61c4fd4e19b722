"""COCO data sets that tests draw: coloured ellipses on noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


class EllipseFolder(NamedTuple):
    images: Path
    annotations: Path
    boxes: Path
    keypoints: Path

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.annotations.read_text())
        return content

    def write(self, content: dict[str, Any]) -> None:
        self.annotations.write_text(json.dumps(content))


def _axes(box: list[float]) -> dict[str, Any]:
    x, y, width, height = box
    middle, below = y + height / 2, (x + width / 2, y + height)
    points = [x, middle, 2, x + width, middle, 2, *below, 1, 0, 0, 0]
    return {"keypoints": points, "num_keypoints": 3}


@pytest.fixture
def draw_ellipses(tmp_path: Path) -> Callable[..., EllipseFolder]:
    """Draw images of one red and one blue ellipse each.

    ``instances.json`` has their outlines as polygons; ``boxes.json`` the same without outlines;
    ``keypoints.json`` only the red ones, with the ends of their axes as keypoints, of which the
    bottom is hidden and the top is unknown. Category ids are neither contiguous nor in order.
    """

    def draw(count: int = 4, width: int = 128, height: int = 96) -> EllipseFolder:
        rng = np.random.default_rng(0)
        folder = tmp_path / "images"
        folder.mkdir()
        images, annotations = [], []
        for index in range(count):
            image = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            pen = ImageDraw.Draw(image)
            for half, (category, colour) in enumerate([(7, "red"), (3, "blue")]):
                cx = width * (0.27 + 0.46 * half) + rng.uniform(-5, 5)
                cy = height / 2 + rng.uniform(-10, 10)
                rx, ry = rng.uniform(width / 9, width / 5), rng.uniform(height / 6, height / 3)
                turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
                outline = np.stack([cx + rx * np.cos(turn), cy + ry * np.sin(turn)], axis=1)
                pen.polygon([(float(x), float(y)) for x, y in outline], fill=COLOURS[colour])
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 100 + index,
                        "category_id": category,
                        "bbox": [float(cx - rx), float(cy - ry), float(2 * rx), float(2 * ry)],
                        "area": float(np.pi * rx * ry),
                        "iscrowd": 0,
                        "segmentation": [[float(v) for v in outline.ravel()]],
                    }
                )
            name = f"{index}.png"
            image.save(folder / name)
            images.append({"id": 100 + index, "file_name": name, "width": width, "height": height})
        categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "instances.json").write_text(json.dumps(content))
        content["annotations"] = [{**a, "segmentation": []} for a in annotations]
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        red = [{**a, **_axes(a["bbox"])} for a in annotations if a["category_id"] == 7]
        names = ["left_end", "right_end", "bottom", "top"]
        posed = {"id": 7, "name": "red", "keypoints": names, "skeleton": [[1, 2], [3, 4]]}
        content = {"images": images, "annotations": red, "categories": [posed]}
        (tmp_path / "keypoints.json").write_text(json.dumps(content))
        files = (tmp_path / f"{name}.json" for name in ("instances", "boxes", "keypoints"))
        return EllipseFolder(folder, *files)

    return draw
