"""``maskcast predict``: finds the instances in images; writes annotated images and COCO results."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from PIL import Image

from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image
from maskcast.engines.load import predict
from maskcast.pipeline.outputs.draw import Annotator

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class ImageRecord(msgspec.Struct, frozen=True):
    """The instances of one image, as a line of JSON.

    Attributes:
        file: the image's path, as it was given.
        width, height: the image's size, pixels.
        instances: COCO results, as ``Instances.to_coco`` makes them.
    """

    file: str
    width: int
    height: int
    instances: list[dict[str, object]]


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Return the image files that paths, folders and quoted patterns match, without repeats.

    Raises:
        InputError: one of them matches no image.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not paths:
                raise InputError(f"{path}: no images in this folder ({', '.join(SUFFIXES)})")
        elif path.exists():
            paths = [path]
        else:
            # A pattern may be absolute, which Path.glob does not support.
            paths = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
            if not paths:
                raise InputError(f"{path}: no such image; check the path or the pattern")
        found |= dict.fromkeys(paths)
    return list(found)


def predict_files(
    engine: Engine, paths: Iterable[Path], out: Path | None, min_score: float | None
) -> Iterator[ImageRecord]:
    """Find the instances in image files; with ``out``, also write annotated images.

    Args:
        engine: runs the model.
        paths: image files.
        out: folder for the annotated images, created if it is missing; None writes none.
        min_score: minimum score, 0..1; None for the bundle's own threshold.

    Raises:
        InputError: an image cannot be read or written, or an output is an input.
    """
    if out is not None and not out.is_dir() and (out.exists() or out.suffix.lower() in SUFFIXES):
        raise InputError(f"{out}: not a folder; give a folder for the annotated images")
    written: set[Path] = set()
    for path in paths:
        rgb = read_image(path)
        instances = predict(rgb, engine, min_score)
        if out is not None:
            image = Image.fromarray(rgb)
            Annotator(engine.manifest.labels, engine.manifest.keypoints).draw(image, instances)
            _save(image, _free_path(out, path, written), path)
        objects = instances.to_coco(engine.manifest.labels)
        yield ImageRecord(str(path), instances.width, instances.height, objects)


def _free_path(out: Path, path: Path, written: set[Path]) -> Path:
    """Return the path of an annotated image; images with the same name get numbers."""
    target, number = out / path.name, 1
    while target in written:
        number += 1
        target = out / f"{path.stem}-{number}{path.suffix}"
    written.add(target)
    return target


def _save(image: Image.Image, target: Path, source: Path) -> None:
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: is an input; choose another --out folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{target}: cannot be written: {reason}") from None
