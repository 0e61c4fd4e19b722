"""Instance annotations in COCO's JSON form as training examples."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from faster_coco_eval import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from maskcast.builder.evaluation.coco import (
    Annotation,
    check_size,
    encode_mask,
    keypoints_of,
    read_annotations,
    read_keypoints,
)
from maskcast.builder.evaluation.evaluate import to_pixels
from maskcast.builder.training import augment
from maskcast.builder.training.augment import Example
from maskcast.builder.training.recipe import Recipe
from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image
from maskcast.engines.instances.keypoints import Keypoints

Masks = Literal["all", "some", "none"]


class InstanceDataset:
    """The images of one annotation file, read on demand.

    Crowds (``iscrowd``) are left out. Images without instances are kept, as examples of background.
    Categories are matched to ``labels`` by name; others are left out.

    Args:
        images: folder of the images.
        annotations: JSON file.
        labels: class names; the label of ``labels[i]`` is ``i + 1``. By default all categories of
            the file in the order of their ids.
        masks: "all": every instance has one; "some": those of instances that have one are read;
            "none": masks are not read.
        with_keypoints: read keypoints, if a category has any.

    Attributes:
        annotations: as given.
        labels: as given, or found.
        masks: as given.
        keypoints: names and skeleton of the keypoints; None if they are not read.

    Raises:
        InputError: a path, a mask or every category is missing, or the JSON is not COCO's.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        labels: tuple[str, ...] | None = None,
        masks: Masks = "all",
        with_keypoints: bool = False,
    ) -> None:
        content = read_annotations(annotations)
        self.keypoints = read_keypoints(content, annotations) if with_keypoints else None
        if not images.is_dir():
            raise InputError(f"{images}: no such folder; give a folder of images")
        # Ids may be numbers and strings.
        categories = sorted(
            content["categories"], key=lambda c: (isinstance(c["id"], str), c["id"])
        )
        self.labels = labels or tuple(str(category["name"]) for category in categories)
        label_of_name = {name: label for label, name in enumerate(self.labels, start=1)}
        self._label_of_category = {
            category["id"]: label_of_name[str(category["name"])]
            for category in categories
            if str(category["name"]) in label_of_name
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
            if masks == "all" and not annotation.get("segmentation"):
                raise InputError(
                    f"{annotations}: annotation {annotation['id']} has no mask; "
                    "give files with boxes alone as box annotations, or train without masks"
                )
            if self.keypoints is not None:
                keypoints_of(annotation, len(self.keypoints), annotations)
            instances[annotation["image_id"]].append(annotation)
        self.masks: Masks = masks
        self._images, self.annotations = images, annotations
        self._entries = [(image, instances[image["id"]]) for image in content["images"]]
        for image, _ in self._entries:
            path = images / image["file_name"]
            if not path.is_file():
                raise InputError(f"{path}: no such image, but {annotations} names it")

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, index: int) -> int:
        """Return the number of instances of an image."""
        return len(self._entries[index][1])

    def found_masks(self) -> Masks:
        """Return which of the instances have a mask."""
        kinds = {bool(a.get("segmentation")) for _, entries in self._entries for a in entries}
        return "some" if len(kinds) > 1 else "all" if True in kinds else "none"

    def read(self, index: int) -> Example:
        """Decode an image and rasterise its instances.

        Raises:
            InputError: the image is missing, damaged or of another size than its entry says, or a
                mask is not one of this image.
        """
        entry, annotations = self._entries[index]
        image = read_image(self._images / entry["file_name"])
        check_size(image, entry, self.annotations)
        height, width = image.shape[:2]
        boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self._label_of_category[a["category_id"]] for a in annotations]
        masks = None
        if self.masks != "none":
            masks = np.zeros((len(annotations), height, width), np.uint8)
            for mask, annotation in zip(masks, annotations, strict=True):
                if not annotation.get("segmentation"):
                    continue
                rle = encode_mask(annotation, height, width, self.annotations)
                mask[:] = coco_mask.decode(rle)
        keypoints = None
        if self.keypoints is not None:
            count = len(self.keypoints)
            points = [keypoints_of(a, count, self.annotations) for a in annotations]
            keypoints = np.array(points, np.float32).reshape(-1, count, 3)
        return Example(image, boxes, np.array(labels, np.int64), masks, keypoints)


def open_keypoints(
    images: Path, annotations: Sequence[Path], labels: tuple[str, ...], *, with_masks: bool
) -> list[InstanceDataset]:
    """Open annotation files with keypoints; ``with_masks`` reads masks from files that have any.

    Raises:
        InputError: a file has no keypoints or not those of the first, or there are several classes.
    """
    opened: list[InstanceDataset] = []
    for path in annotations:
        data = InstanceDataset(images, path, labels=labels, masks="none", with_keypoints=True)
        if with_masks:
            data.masks = data.found_masks()
        if data.keypoints is None:
            raise InputError(f"{path}: none of its categories has keypoints")
        if opened and data.keypoints != opened[0].keypoints:
            raise InputError(f"{path}: its keypoints differ from those in {annotations[0]}")
        if len(labels) > 1:
            raise InputError(
                f"{path}: a keypoint branch serves a model of one class, not of {len(labels)}: "
                f"{', '.join(labels[:5])}"
            )
        opened.append(data)
    return opened


class AugmentedDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Examples of several data sets, augmented, as tensors.

    An item's key is (epoch, index). Its augmentation is a function of the key and the seed alone,
    so that a resumed run sees what an uninterrupted one would have seen, in any worker.

    Args:
        datasets: sources of the examples.
        recipe: how to augment it.
        seed: random seed.
        keypoints: those of every example; unknown ones if its data set has none.

    Raises:
        InputError: a data set has other keypoints.
    """

    def __init__(
        self,
        datasets: list[InstanceDataset],
        recipe: Recipe,
        seed: int,
        keypoints: Keypoints | None = None,
    ) -> None:
        for dataset in datasets:
            if dataset.keypoints not in (None, keypoints):
                raise InputError(
                    f"{dataset.annotations}: its keypoints differ from those in the keypoint files"
                )
        self._items = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
        self._pasted = [
            (dataset, i)
            for dataset, i in self._items
            if dataset.masks == "all" and dataset.count(i)
        ]
        self._recipe = recipe
        self._seed = seed
        self._keypoints = keypoints

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, float ``[3, H, W]`` in 0..1, and its target for ``compute_losses``."""
        epoch, index = key
        dataset, item = self._items[index]
        rng = np.random.default_rng((self._seed, epoch, index))
        example = self._read(dataset, item, rng)
        if rng.random() < self._recipe.paste and self._pasted:
            dataset, item = self._pasted[rng.integers(len(self._pasted))]
            other = self._read(dataset, item, rng)
            example = augment.paste(example, other, rng.random(len(other.boxes)) < 0.7)
        return to_tensors(example)

    def _read(self, dataset: InstanceDataset, item: int, rng: np.random.Generator) -> Example:
        example = dataset.read(item)
        if self._keypoints is None:
            return augment_example(example, self._recipe, rng)
        if example.keypoints is None:
            unknown = np.zeros((len(example.boxes), len(self._keypoints), 3), np.float32)
            example = example._replace(keypoints=unknown)
        return augment_example(example, self._recipe, rng, self._keypoints.mirrored)


def augment_example(
    example: Example, recipe: Recipe, rng: np.random.Generator, mirrored: Sequence[int] = ()
) -> Example:
    """Apply the augmentation of a recipe; ``mirrored`` as for ``augment.flip``."""
    if recipe.colour_jitter > 0:
        image = augment.jitter_colour(example.image, rng, recipe.colour_jitter)
        example = example._replace(image=image)
    if recipe.canvas is not None:
        example = augment.random_canvas(example, recipe.canvas, recipe.canvas_scales, rng)
    else:
        example = augment.random_shorter_side(example, recipe.shorter_sides, recipe.longest, rng)
    if rng.random() < 0.5:
        example = augment.flip(example, mirrored)
    return example


def to_tensors(example: Example) -> tuple[Tensor, dict[str, Tensor]]:
    """Convert an example to an image and a target of ``compute_losses``."""
    target = {
        "boxes": torch.from_numpy(example.boxes),
        "labels": torch.from_numpy(example.labels),
    }
    if example.masks is not None:
        target["masks"] = torch.from_numpy(np.ascontiguousarray(example.masks))
    if example.keypoints is not None:
        target["keypoints"] = torch.from_numpy(example.keypoints)
    return to_pixels(example.image), target


def collate(
    items: list[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Separate the images and the targets of a batch."""
    return [image for image, _ in items], [target for _, target in items]


class EpochSampler:
    """Batches of (epoch, index) keys from a given iteration on; a new permutation each epoch.

    An incomplete batch at the end of an epoch is skipped.
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
