"""COCO box and mask AP (Lin et al., "Microsoft COCO", ECCV 2014) of any predictor."""

import contextlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask

from maskcast.builder.operating_point import measure_operating_point
from maskcast.builder.training.augment import Pixels
from maskcast.builder.training.dataset import encode_segmentation, read_annotations, read_image
from maskcast.engines.errors import InputError

Rle = dict[str, Any]
Scores = dict[str, Any]


class Prediction(NamedTuple):
    """What a predictor found in one image.

    Attributes:
        boxes: float32 ``[N, 4]``, xyxy in pixels of the source image.
        scores: float32 ``[N]``, 0..1.
        labels: integer ``[N]``, from 1, of the predictor's label names.
        masks: COCO's compressed RLE of each, in the size of the source image; None without masks.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]
    masks: list[Rle] | None


Predictor = Callable[[Pixels], Prediction]


def evaluate(
    predict: Predictor,
    images: Path,
    annotations: Path,
    labels: tuple[str, ...],
    *,
    with_masks: bool = True,
    threshold: float | None = None,
    limit: int | None = None,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Scores:
    """Score a predictor against an annotation file.

    Categories are matched by name, and only those among ``labels`` are scored. Crowds and size
    ranges follow COCO's rules. A file without annotations gives the false alarms alone.

    Args:
        predict: maps uint8 ``[H, W, 3]`` RGB to what it found.
        images: folder of the images.
        annotations: COCO's JSON.
        labels: names of the labels 1, 2, ...
        with_masks: score masks too.
        threshold: score, 0..1, to report an ``OperatingPoint`` for.
        limit: use only the first N images.
        track: wraps the list of images, to show progress.

    Returns:
        ``images``, their number; ``bbox`` and, with masks, ``segm``: the fractions AP, AP50, AP75,
        APs, APm, APl (-1 where there is no instance of that size); with a threshold,
        ``at_threshold``: an ``OperatingPoint``.

    Raises:
        InputError: the annotations have no masks, or no category that the predictor knows.
    """
    content = read_annotations(annotations)
    category_of_name = {str(c["name"]): int(c["id"]) for c in content["categories"]}
    category_of_label = {
        label: category_of_name[name]
        for label, name in enumerate(labels, start=1)
        if name in category_of_name
    }
    if not category_of_label:
        raise InputError(f"{annotations}: none of its categories is one of {', '.join(labels)}")
    chosen = content["images"][:limit]
    truth = _truth(content, chosen, set(category_of_label.values()), with_masks, annotations)
    found: list[dict[str, Any]] = []
    for image in track(chosen):
        prediction = predict(read_image(images / image["file_name"]))
        found += _results(prediction, image["id"], category_of_label)
    scores: Scores = {"images": len(chosen)}
    for kind in ("bbox", "segm") if with_masks else ("bbox",):
        scores[kind] = _average_precision(truth, found, kind)
    if threshold is not None:
        scores["at_threshold"] = measure_operating_point(
            truth["annotations"], found, len(chosen), threshold
        )
    return scores


def _truth(
    content: dict[str, Any],
    images: list[dict[str, Any]],
    categories: set[int],
    with_masks: bool,
    path: Path,
) -> dict[str, Any]:
    """Select what is scored, in the form that the evaluation wants."""
    size = {p["id"]: (int(p["height"]), int(p["width"])) for p in images}
    annotations: list[dict[str, Any]] = []
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories or annotation["image_id"] not in size:
            continue
        entry = {
            "iscrowd": 0,
            "area": annotation["bbox"][2] * annotation["bbox"][3],
            **annotation,
            "id": len(annotations) + 1,
        }
        if with_masks:
            if not annotation.get("segmentation"):
                raise InputError(
                    f"{path}: annotation {annotation.get('id')} has no mask; score boxes alone"
                )
            rle = encode_segmentation(annotation["segmentation"], *size[annotation["image_id"]])
            entry["segmentation"] = rle
        else:
            entry.pop("segmentation", None)
        annotations.append(entry)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [c for c in content["categories"] if c["id"] in categories],
    }


def _results(
    prediction: Prediction, image_id: int, category_of_label: dict[int, int]
) -> Iterable[dict[str, Any]]:
    for index, (box, score, label) in enumerate(
        zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)
    ):
        category = category_of_label.get(int(label))
        if category is None:
            continue
        left, top, right, bottom = (float(side) for side in box)
        result = {
            "image_id": image_id,
            "category_id": category,
            "bbox": [left, top, right - left, bottom - top],
            "score": float(score),
        }
        if prediction.masks is not None:
            result["segmentation"] = prediction.masks[index]
        yield result


def _average_precision(
    truth: dict[str, Any], found: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    if kind == "bbox":
        found = [{k: v for k, v in result.items() if k != "segmentation"} for result in found]
    if all(annotation["iscrowd"] for annotation in truth["annotations"]):
        return dict.fromkeys(names, -1.0)
    if not found:
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(truth)
        scoring = COCOeval_faster(expected, expected.loadRes(found), kind, print_function=_discard)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return {name: float(value) for name, value in zip(names, scoring.stats[:6], strict=True)}


def _discard(*_: Any) -> None:
    """Take the place of the evaluation's own report."""


def encode_masks(masks: npt.NDArray[np.bool_]) -> list[Rle]:
    """Encode full-size masks, bool ``[N, H, W]``, as COCO's compressed RLE."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    encoded: list[Rle] = coco_mask.encode(columns)
    return encoded


def torch_predictor(network: Any) -> Predictor:
    """Make a predictor of a torchvision detection network in evaluation mode."""
    device = next(network.parameters()).device

    def predict(image: Pixels) -> Prediction:
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(device).float().div_(255)
        with torch.inference_mode():
            output = {name: value.cpu() for name, value in network([pixels])[0].items()}
        masks = None
        if "masks" in output:
            masks = encode_masks((output["masks"][:, 0] > 0.5).numpy())
        return Prediction(
            output["boxes"].numpy(), output["scores"].numpy(), output["labels"].numpy(), masks
        )

    return predict
