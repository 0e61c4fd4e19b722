"""COCO annotation files: reading, checking and encoding of masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from faster_coco_eval import mask as coco_mask
from numpy.typing import NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.engines.instances.rle import compress_runs, decompress_runs

Annotation = dict[str, Any]
Rle = dict[str, Any]
"""COCO's compressed RLE: ``{"size": [height, width], "counts": bytes}``."""

# The keys that are read; COCO's files have more.
_REQUIRED = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}
_MIN_OUTLINE = 10_000
"""Length, in pixels, that the outline of a polygon may have in any image."""


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO annotation file.

    Raises:
        InputError: the file is missing or not JSON, or an entry lacks one of COCO's keys or holds a
            value of another type.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read the annotations ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a COCO annotation file, it is not an object")
    for name, keys in _REQUIRED.items():
        if not isinstance(content.get(name), list):
            raise InputError(f"{path}: not a COCO annotation file, it has no list {name!r}")
        for entry in content[name]:
            missing = keys - entry.keys() if isinstance(entry, dict) else keys
            if missing:
                raise InputError(f"{path}: an entry of {name!r} has no {min(missing)!r}")
            for key in keys & {"id", "image_id", "category_id"}:
                if not isinstance(entry[key], int | str):
                    raise InputError(f"{path}: an entry of {name!r} has {entry[key]!r} as {key!r}")
    for image in content["images"]:
        if not isinstance(image["file_name"], str) or not _is_size(image["height"], image["width"]):
            raise InputError(f"{path}: image {image['id']}: invalid file_name, height or width")
    for annotation in content["annotations"]:
        if not _is_box(annotation["bbox"]):
            raise InputError(
                f"{path}: annotation {annotation['id']}: its bbox is not x, y, width, height"
            )
    return content


def read_keypoints(content: dict[str, Any], path: Path) -> Keypoints | None:
    """Return the names and skeleton of an annotation file's keypoints; None if it has none.

    Args:
        content: from ``read_annotations``.
        path: of the file, for error messages.

    Raises:
        InputError: several categories have keypoints, or they are not in COCO's form.
    """
    found = [category for category in content["categories"] if category.get("keypoints")]
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(str(category["name"]) for category in found[:5])
        raise InputError(f"{path}: several categories have keypoints ({names}); keep one")
    try:
        # COCO counts from 1.
        skeleton = [[place - 1 for place in line] for line in found[0].get("skeleton", [])]
        return msgspec.convert({"names": found[0]["keypoints"], "skeleton": skeleton}, Keypoints)
    except (msgspec.ValidationError, TypeError) as error:
        raise InputError(
            f"{path}: its category's keypoints are not in COCO's form ({error})"
        ) from None


def keypoints_of(annotation: Annotation, count: int, path: Path) -> NDArray[np.float32]:
    """Return the keypoints of an annotation, ``[count, 3]`` float32: x, y, and COCO's visibility.

    The visibility is 0 for an unknown point, 1 for a hidden and 2 for a visible one. All points of
    an annotation without keypoints are unknown.

    Raises:
        InputError: the number of points is not ``count``, or a value is invalid.
    """
    values = annotation.get("keypoints") or [0] * 3 * count
    if (
        not isinstance(values, list)
        or len(values) != 3 * count
        or not all(_is_number(value) for value in values)
        or not set(values[2::3]) <= {0, 1, 2}
    ):
        raise InputError(
            f"{path}: annotation {annotation['id']}: its keypoints are not {count} times x, y and "
            "visibility (0, 1 or 2)"
        )
    return np.array(values, np.float32).reshape(count, 3)


def check_size(image: NDArray[np.uint8], entry: dict[str, Any], path: Path) -> None:
    """Compare an image with its entry in the annotation file ``path``.

    Raises:
        InputError: they differ in size, so the annotations cannot be of this image.
    """
    height, width = image.shape[:2]
    if (height, width) != (entry["height"], entry["width"]):
        raise InputError(
            f"{entry['file_name']}: {width}x{height} pixels when upright, but {path} says "
            f"{entry['width']}x{entry['height']}; correct one of them"
        )


def encode_mask(annotation: Annotation, height: int, width: int, path: Path) -> Rle:
    """Convert the polygons or the RLE of an annotation to COCO's compressed RLE.

    Args:
        annotation: with a ``segmentation``.
        height: of its image, pixels.
        width: of its image, pixels.
        path: of the annotation file, for error messages.

    Raises:
        InputError: the segmentation is damaged or of an image of another size.
    """
    try:
        return _encode(annotation["segmentation"], height, width)
    except ValueError as error:
        raise InputError(f"{path}: annotation {annotation['id']}: {error}") from None


def _encode(segmentation: Any, height: int, width: int) -> Rle:
    if isinstance(segmentation, list):
        polygons = [_polygon(points, height, width) for points in segmentation]
        merged: Rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return merged
    if not isinstance(segmentation, dict):
        raise ValueError("its segmentation is neither polygons nor RLE")
    if segmentation.get("size") != [height, width]:
        raise ValueError(
            f"its RLE is of size {segmentation.get('size')}, its image is {[height, width]}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and 0 <= run <= height * width for run in counts):
            raise ValueError("its RLE has an invalid run")
        runs = np.array(counts, np.int64)
        if runs.sum() != height * width:
            raise ValueError(f"its RLE covers {runs.sum()} of {height * width} pixels")
        (counts,) = compress_runs([runs])
    elif isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
        try:
            decompress_runs(counts, height * width)
        except ValueError as error:
            raise ValueError(f"its RLE is damaged: {error}") from None
    else:
        raise ValueError("its RLE has no counts")
    return {"size": [height, width], "counts": counts}


def _polygon(points: Any, height: int, width: int) -> list[float]:
    """Check a polygon, ``x, y, x, y, ...``; COCO's rasteriser clips it to the image."""
    if not isinstance(points, list) or not all(_is_number(value) for value in points):
        raise ValueError("a polygon is not a list of numbers")
    if len(points) < 6 or len(points) % 2:
        raise ValueError("a polygon does not have three points or more, as x, y, x, y, ...")
    corners = np.array(points, np.float64).reshape(-1, 2)
    size = np.array([width, height])
    if (corners < -size).any() or (corners > 2 * size).any():
        raise ValueError("a polygon lies far outside its image")
    # The rasteriser holds every point of the outline in memory.
    steps = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1) + 1
    if steps.sum() > 2 * height * width + _MIN_OUTLINE:
        raise ValueError("a polygon has a longer outline than its image has pixels")
    return [float(value) for value in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 2**40  # false for NaN too


def _is_size(height: Any, width: Any) -> bool:
    return all(isinstance(side, int) and 1 <= side <= 2**16 for side in (height, width))


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(_is_number(value) for value in box)
        and min(box[2:]) >= 0
    )
