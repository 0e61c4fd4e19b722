"""Instance annotations in COCO's JSON form as training examples."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from maskcast.builder.training import augment
from maskcast.builder.training.augment import Example
from maskcast.builder.training.recipe import Recipe
from maskcast.engines.errors import InputError

Annotation = dict[str, Any]

# What is read of an annotation file; COCO's files have more.
_REQUIRED = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


class InstanceDataset:
    """The pictures of one annotation file, read on demand.

    Crowds (``iscrowd``) are no targets. Pictures without any instance stay: they teach what is
    background. Categories are matched to ``labels`` by name, others are left out.

    Args:
        images: folder of the pictures.
        annotations: JSON file.
        labels: class names; the label of ``labels[i]`` is ``i + 1``. By default all the file's
            categories in the order of their ids.
        with_masks: read masks, and demand one for every instance.

    Raises:
        InputError: a path is missing, the JSON is not COCO's, a mask or a category is.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        labels: tuple[str, ...] | None = None,
        with_masks: bool = True,
    ) -> None:
        content = read_annotations(annotations)
        if not images.is_dir():
            raise InputError(f"{images}: no such folder of pictures")
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        self.labels = labels or tuple(str(category["name"]) for category in categories)
        label_of_name = {name: label for label, name in enumerate(self.labels, start=1)}
        self._label_of_category = {
            category["id"]: label_of_name[category["name"]]
            for category in categories
            if category["name"] in label_of_name
        }
        if not self._label_of_category:
            raise InputError(
                f"{annotations}: none of its categories is one of {', '.join(self.labels)}"
            )
        instances: defaultdict[int, list[Annotation]] = defaultdict(list)
        for annotation in content["annotations"]:
            if (
                annotation.get("iscrowd")
                or annotation["category_id"] not in self._label_of_category
            ):
                continue
            if with_masks and not annotation.get("segmentation"):
                raise InputError(
                    f"{annotations}: annotation {annotation['id']} has no mask; "
                    "give files with boxes alone as box annotations, or train without masks"
                )
            instances[annotation["image_id"]].append(annotation)
        self.with_masks = with_masks
        self._entries = [
            (images / image["file_name"], instances[image["id"]]) for image in content["images"]
        ]
        for path, _ in self._entries:
            if not path.is_file():
                raise InputError(f"{path}: no such picture, though {annotations} names it")

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, index: int) -> int:
        """Tell how many instances a picture has."""
        return len(self._entries[index][1])

    def read(self, index: int) -> Example:
        """Decode the picture and rasterise its instances.

        Raises:
            InputError: the picture is missing or broken.
        """
        path, annotations = self._entries[index]
        image = read_image(path)
        height, width = image.shape[:2]
        boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self._label_of_category[a["category_id"]] for a in annotations]
        masks = None
        if self.with_masks:
            masks = np.zeros((len(annotations), height, width), np.uint8)
            for mask, annotation in zip(masks, annotations, strict=True):
                rle = encode_segmentation(annotation["segmentation"], height, width)
                mask[:] = coco_mask.decode(rle)
        return Example(image, boxes, np.array(labels, np.int64), masks)


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO annotation file.

    Raises:
        InputError: it is missing, is no JSON, or lacks one of COCO's lists or keys.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read the annotations ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a COCO annotation file, it holds no object")
    for name, keys in _REQUIRED.items():
        if not isinstance(content.get(name), list):
            raise InputError(f"{path}: not a COCO annotation file, it has no list {name!r}")
        for entry in content[name]:
            missing = keys - entry.keys() if isinstance(entry, dict) else keys
            if missing:
                raise InputError(f"{path}: an entry of {name!r} has no {min(missing)!r}")
    return content


def read_image(path: Path) -> augment.Pixels:
    """Decode a picture to uint8 ``[H, W, 3]``, RGB.

    Raises:
        InputError: it is missing or broken.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path}: cannot decode the picture ({error})") from None


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Convert polygons, or either form of RLE, to COCO's compressed RLE."""
    if isinstance(segmentation, list):
        parts: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        return parts
    if isinstance(segmentation["counts"], list):
        whole: dict[str, Any] = coco_mask.frPyObjects(segmentation, height, width)
        return whole
    return dict(segmentation)


class AugmentedDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Examples of several data sets, augmented, as tensors.

    An item is asked for by (epoch, index), and its augmentation is a function of that pair and the
    seed alone: a resumed run sees what the uninterrupted one would have seen, whoever loads it.
    """

    def __init__(self, datasets: list[InstanceDataset], recipe: Recipe, seed: int) -> None:
        self._items = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
        self._pasted = [
            (dataset, i) for dataset, i in self._items if dataset.with_masks and dataset.count(i)
        ]
        self._recipe = recipe
        self._seed = seed

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, float ``[3, H, W]`` in 0..1, and its target for ``compute_losses``."""
        epoch, index = key
        dataset, item = self._items[index]
        rng = np.random.default_rng((self._seed, epoch, index))
        example = augment_example(dataset.read(item), self._recipe, rng)
        if rng.random() < self._recipe.paste and self._pasted:
            dataset, item = self._pasted[rng.integers(len(self._pasted))]
            other = augment_example(dataset.read(item), self._recipe, rng)
            example = augment.paste(example, other, rng.random(len(other.boxes)) < 0.7)
        return to_tensors(example)


def augment_example(example: Example, recipe: Recipe, rng: np.random.Generator) -> Example:
    """Apply the augmentation of a recipe."""
    if recipe.colour_jitter > 0:
        image = augment.jitter_colour(example.image, rng, recipe.colour_jitter)
        example = example._replace(image=image)
    if recipe.canvas is not None:
        example = augment.random_canvas(example, recipe.canvas, recipe.canvas_scales, rng)
    else:
        example = augment.random_shorter_side(example, recipe.shorter_sides, recipe.longest, rng)
    if rng.random() < 0.5:
        example = augment.flip(example)
    return example


def to_tensors(example: Example) -> tuple[Tensor, dict[str, Tensor]]:
    """Convert an example to what ``compute_losses`` takes of one image."""
    pixels = np.ascontiguousarray(example.image.transpose(2, 0, 1))
    target = {
        "boxes": torch.from_numpy(example.boxes),
        "labels": torch.from_numpy(example.labels),
    }
    if example.masks is not None:
        target["masks"] = torch.from_numpy(np.ascontiguousarray(example.masks))
    return torch.from_numpy(pixels).float().div_(255), target


def collate(
    items: list[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Make the images and the targets of a batch."""
    return [image for image, _ in items], [target for _, target in items]


class EpochSampler:
    """Batches of (epoch, index) keys from a given iteration on: each epoch a permutation anew.

    What is left over at the end of an epoch, less than a batch, is skipped.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, start: int, stop: int) -> None:
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._size // self._batch_size
        order: list[int] = []
        for iteration in range(self._start, self._stop):
            epoch, batch = divmod(iteration, batches)
            if batch == 0 or not order:
                order = np.random.default_rng((self._seed, epoch)).permutation(self._size).tolist()
            chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield [(epoch, index) for index in chosen]
