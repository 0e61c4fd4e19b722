"""COCO box, mask and keypoint AP (Lin et al., "Microsoft COCO", 2014) of any predictor."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask

from maskcast.builder.evaluation.coco import (
    Annotation,
    Rle,
    check_size,
    encode_mask,
    keypoints_of,
    read_annotations,
    read_keypoints,
)
from maskcast.builder.evaluation.operating_point import measure_operating_point
from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints

Scores = dict[str, Any]


class Prediction(NamedTuple):
    """What a predictor found in one image.

    Attributes:
        boxes: float32 ``[N, 4]``, xyxy in pixels of the source image.
        scores: float32 ``[N]``, 0..1.
        labels: integer ``[N]``, from 1, of the predictor's label names.
        masks: COCO's compressed RLE of each, in the size of the source image; None without masks.
        keypoints: float32 ``[N, K, 3]``, x and y in pixels of the source image, and a score; None
            without keypoints.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]
    masks: list[Rle] | None
    keypoints: npt.NDArray[np.float32] | None = None


Predictor = Callable[[npt.NDArray[np.uint8]], Prediction]


def evaluate(
    predict: Predictor,
    images: Path,
    annotations: Path,
    labels: tuple[str, ...],
    *,
    with_masks: bool = True,
    keypoints: Keypoints | None = None,
    threshold: float | None = None,
    limit: int | None = None,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Scores:
    """Score a predictor against an annotation file.

    Categories are matched by name, and only those among ``labels`` are scored. Crowds and size
    ranges follow COCO's rules. If the file has no annotations, only false alarms are measured.
    Keypoints are scored only if the predictor's and the annotations' are those of COCO's person:
    COCO defines no tolerances for others. Instances without known keypoints are not scored there.

    Args:
        predict: maps an RGB image, uint8 ``[H, W, 3]``, to a ``Prediction``.
        images: folder of the images.
        annotations: COCO's JSON.
        labels: names of the labels 1, 2, ...
        with_masks: score masks too, unless all annotations have boxes only.
        keypoints: the keypoints that the predictor finds; None scores none.
        threshold: score, 0..1, to report an ``OperatingPoint`` for.
        limit: use only the first N images.
        track: wraps the list of images, to show progress.

    Returns:
        ``images``, their number; ``bbox`` and, with masks, ``segm``: the fractions AP, AP50, AP75,
        APs, APm, APl (-1 where there is no instance of that size); with keypoints, ``keypoints``:
        the same without APs; with a threshold, ``at_threshold``: an ``OperatingPoint``.

    Raises:
        InputError: the annotations have no masks, or no category that the predictor knows.
    """
    content = read_annotations(annotations)
    category_of_name = {str(c["name"]): c["id"] for c in content["categories"]}
    # The evaluation uses labels as ids: those of the file may be strings.
    label_of_category = {
        category_of_name[name]: label
        for label, name in enumerate(labels, start=1)
        if name in category_of_name
    }
    if not label_of_category:
        raise InputError(f"{annotations}: none of its categories is one of {', '.join(labels)}")
    annotated: defaultdict[Any, list[Annotation]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] in label_of_category:
            annotated[annotation["image_id"]].append(annotation)
    masks = [bool(a.get("segmentation")) for entries in annotated.values() for a in entries]
    with_masks = with_masks and (any(masks) or not masks)
    known = None if keypoints is None else read_keypoints(content, annotations)
    with_keypoints = all(k is not None and k.names == COCO_PERSON.names for k in (keypoints, known))
    chosen = content["images"][:limit]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(track(chosen), start=1):
        image = read_image(images / entry["file_name"])
        check_size(image, entry, annotations)
        for annotation in annotated[entry["id"]]:
            record = _truth(annotation, with_masks, image.shape[:2], annotations)
            if with_keypoints:
                points = keypoints_of(annotation, len(COCO_PERSON), annotations)
                record["keypoints"] = points.ravel().tolist()
                record["num_keypoints"] = int((points[:, 2] > 0).sum())
            label = label_of_category[annotation["category_id"]]
            truth.append({**record, "id": len(truth) + 1, "image_id": number, "category_id": label})
        found += _results(predict(image), number, set(label_of_category.values()))
    scores: Scores = {"images": len(chosen)}
    dataset = {
        "images": [
            {"id": number, "height": entry["height"], "width": entry["width"]}
            for number, entry in enumerate(chosen, start=1)
        ],
        "annotations": truth,
        "categories": [{"id": label} for label in label_of_category.values()],
    }
    kinds = {"bbox": True, "segm": with_masks, "keypoints": with_keypoints}
    for kind in (kind for kind, is_scored in kinds.items() if is_scored):
        scores[kind] = _average_precision(dataset, found, kind)
    if threshold is not None:
        scores["at_threshold"] = measure_operating_point(truth, found, len(chosen), threshold)
    return scores


def _truth(
    annotation: Annotation, with_masks: bool, size: tuple[int, int], path: Path
) -> dict[str, Any]:
    """Select the keys of an annotation that the evaluation reads."""
    area = annotation.get("area")
    if not isinstance(area, int | float):
        area = annotation["bbox"][2] * annotation["bbox"][3]
    record = {
        "bbox": annotation["bbox"],
        "area": area,
        "iscrowd": int(bool(annotation.get("iscrowd"))),
    }
    if with_masks:
        if not annotation.get("segmentation"):
            raise InputError(
                f"{path}: annotation {annotation['id']} has no mask, but others have; add it"
            )
        record["segmentation"] = encode_mask(annotation, *size, path)
    return record


def _results(prediction: Prediction, image_id: int, labels: set[int]) -> Iterable[dict[str, Any]]:
    for index, (box, score, label) in enumerate(
        zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)
    ):
        if int(label) not in labels:
            continue
        left, top, right, bottom = (float(side) for side in box)
        result = {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [left, top, right - left, bottom - top],
            "score": float(score),
        }
        if prediction.masks is not None:
            result["segmentation"] = prediction.masks[index]
        if prediction.keypoints is not None:
            result["keypoints"] = prediction.keypoints[index].ravel().tolist()
        yield result


def _average_precision(
    truth: dict[str, Any], found: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    names: tuple[str, ...] = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    counted = [a for a in truth["annotations"] if not a["iscrowd"]]
    if kind == "keypoints":
        names = tuple(name for name in names if name != "APs")  # COCO does not score small people
        counted = [a for a in counted if a["num_keypoints"]]
    # Given several forms in one result, COCO's code may score another one than ``kind``.
    other = {"bbox": {"segmentation", "keypoints"}, "segm": {"keypoints"}}.get(
        kind, {"segmentation", "bbox"}
    )
    found = [{k: v for k, v in result.items() if k not in other} for result in found]
    if not counted:
        return dict.fromkeys(names, -1.0)
    if not found:
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(truth)
        scoring = COCOeval_faster(expected, expected.loadRes(found), kind, print_function=_discard)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    stats = scoring.stats[: len(names)]
    return {name: float(value) for name, value in zip(names, stats, strict=True)}


def _discard(*_: Any) -> None:
    """Suppress the evaluation's own report."""


def encode_masks(masks: npt.NDArray[np.bool_]) -> list[Rle]:
    """Encode full-size masks, bool ``[N, H, W]``, as COCO's compressed RLE."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    encoded: list[Rle] = coco_mask.encode(columns)
    return encoded


def to_pixels(image: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Convert an image, uint8 ``[H, W, 3]``, to a network's form: float ``[3, H, W]``, 0..1."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div_(255)


def torch_predictor(network: Any) -> Predictor:
    """Return a predictor that runs a torchvision detection network in evaluation mode."""
    device = next(network.parameters()).device

    def predict(image: npt.NDArray[np.uint8]) -> Prediction:
        pixels = to_pixels(image).to(device)
        with torch.inference_mode():
            output = {name: value.cpu() for name, value in network([pixels])[0].items()}
        masks = None
        if "masks" in output:
            masks = encode_masks((output["masks"][:, 0] > 0.5).numpy())
        boxes, scores, labels = (output[name].numpy() for name in ("boxes", "scores", "labels"))
        keypoints = output["keypoints"].numpy() if "keypoints" in output else None
        return Prediction(boxes, scores, labels, masks, keypoints)

    return predict
