"""Configuration of a training run."""

from pathlib import Path

import msgspec

from maskcast.builder.training.recipe import Recipe
from maskcast.engines.errors import InputError


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One training run.

    Attributes:
        output: folder of the run: ``checkpoint.pth`` to resume from, ``model.pth``,
            ``metrics.jsonl``, ``metrics.png``.
        images: folder of the training images.
        annotations: their instances, COCO's JSON, and with ``keypoint_annotations`` the keypoints
            of those that have any; None trains the keypoint branch alone, and the rest keeps the
            weights of ``initial``.
        network: name of a preset.
        recipe: optimisation and augmentation.
        with_masks: train Mask R-CNN, else Faster R-CNN from boxes.
        box_annotations: further images of ``images``, annotated without masks; keypoints as in
            ``annotations``.
        keypoint_annotations: further images of ``images``, annotated with keypoints and, in any of
            a file's instances, masks; they define the keypoints that the network finds.
        validation_images: folder of the images to measure on; by default ``images``.
        validation_annotations: instances to measure on; None measures nothing.
        predict_masks: train the mask branch on the images of ``box_annotations`` too, with masks
            that the initial network predicts inside the boxes; needs ``initial``.
        initial: checkpoint or bundle to start from, of the same network with any classes; None
            starts from the backbone's ImageNet weights.
        iterations: number of iterations, instead of the recipe's epochs.
        minutes: duration of the run, instead of the recipe's epochs; above 0. The schedule of the
            learning rate is stretched over it.
        evaluate_every: epochs between two measurements.
        workers: processes that load images; 0 loads them in this one.
        seed: random seed.
    """

    output: Path
    images: Path
    annotations: Path | None = None
    network: str
    recipe: Recipe
    with_masks: bool = True
    box_annotations: Path | None = None
    keypoint_annotations: tuple[Path, ...] = ()
    predict_masks: bool = False
    validation_images: Path | None = None
    validation_annotations: Path | None = None
    initial: Path | None = None
    iterations: int | None = None
    minutes: float | None = None
    evaluate_every: float = 1.0
    workers: int = 1
    seed: int = 0


def check_config(config: TrainConfig) -> None:
    """Check the numbers of a run, and that its settings go together.

    Raises:
        InputError: a number is out of range, or settings exclude each other.
    """
    if not config.recipe.epochs > 0:
        raise InputError(f"epochs {config.recipe.epochs:g}: give a number above 0")
    if config.minutes is not None and not config.minutes > 0:
        raise InputError(f"minutes {config.minutes:g}: give a number above 0")
    if not config.recipe.learning_rate > 0:
        raise InputError(f"learning rate {config.recipe.learning_rate:g}: give a number above 0")
    counts = {
        "batch size": config.recipe.batch_size,
        "branch batch size": config.recipe.branch_batch_size,
        "iterations": config.iterations,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} {count}: give 1 or more")
    if config.workers < 0:
        raise InputError(f"workers {config.workers}: give 0 or more")
    if config.predict_masks and not (
        config.box_annotations and config.initial and config.with_masks
    ):
        raise InputError("predicting masks needs box annotations and an initial model with masks")
    if config.annotations is None:
        _check_keypoints_alone(config)


def _check_keypoints_alone(config: TrainConfig) -> None:
    if not config.keypoint_annotations:
        raise InputError("nothing to train on: give annotations, or keypoints")
    if config.initial is None:
        raise InputError(
            "keypoints without annotations train the keypoint branch alone; "
            "give the model to add it to with --initial"
        )
    if config.box_annotations is not None:
        raise InputError(
            f"{config.box_annotations}: no boxes are learned without annotations; leave it out"
        )
