"""Recipe: the hyperparameters of a training run, with its optimizer and learning rate."""

import math
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from maskcast.engines.errors import InputError


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Optimisation and augmentation; the defaults are the paper's (Mask R-CNN, section 3.1).

    Attributes:
        optimizer: SGD with momentum 0.9, or AdamW.
        learning_rate: peak, for a batch of ``batch_size``.
        weight_decay: of weights; biases and norms have none under AdamW.
        backbone_rate: the backbone's learning rate relative to that of the other layers.
        keypoint_rate: likewise, of the keypoint branch.
        frozen_levels: the stem and this many levels of the backbone keep their ImageNet weights.
        schedule: "step": a tenth after 2/3 and again after 8/9 of the run; "cosine": down to 0.
        warmup_iterations: iterations of linear warm-up.
        gradient_norm: maximum norm of the gradients; None does not clip them.
        average_decay: of the exponential moving average of the weights, which is evaluated and
            kept; None keeps the weights themselves.
        epochs: passes over the images; above 0.
        batch_size: images per iteration.
        branch_batch_size: maximum number of RoIs per image in the losses of masks and keypoints,
            chosen at random; None takes all positive ones.
        keypoint_weight: factor of the keypoint loss where the whole network is trained.
        keypoint_spread: standard deviation of the target around a keypoint, cells of the heatmap;
            None is the paper's one cell.
        keypoint_norms: batch norms in the keypoint branch while it is trained.
        bfloat16: autocast of the network to bfloat16.
        canvas: side of the square crop of each image, pixels; None resizes whole images.
        canvas_scales: range of the longer side before the crop, relative to ``canvas``.
        shorter_sides: range of the shorter side of whole images, pixels.
        longest: limit of the longer side of whole images, pixels.
        colour_jitter: brightness, contrast and saturation vary within 1 ± this.
        paste: share of the examples into which instances of another one, with masks, are pasted;
            needs ``canvas``.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02 / 16 * 2
    weight_decay: float = 1e-4
    backbone_rate: float = 1.0
    keypoint_rate: float = 1.0
    frozen_levels: int = 1
    schedule: Literal["step", "cosine"] = "step"
    warmup_iterations: int = 500
    gradient_norm: float | None = None
    average_decay: float | None = None
    epochs: float = 12
    batch_size: int = 2
    branch_batch_size: int | None = None
    keypoint_weight: float = 1.0
    keypoint_spread: float | None = None
    keypoint_norms: bool = False
    bfloat16: bool = False
    canvas: int | None = None
    canvas_scales: tuple[float, float] = (0.7, 1.7)
    shorter_sides: tuple[int, int] = (640, 800)
    longest: int = 1333
    colour_jitter: float = 0.0
    paste: float = 0.0


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(),
    "lite-cpu": Recipe(
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=0.02,
        backbone_rate=0.25,
        keypoint_rate=3.0,
        schedule="cosine",
        warmup_iterations=250,
        gradient_norm=5.0,
        average_decay=0.999,
        batch_size=4,
        branch_batch_size=12,
        keypoint_weight=0.4,
        keypoint_spread=1.5,
        keypoint_norms=True,
        bfloat16=True,
        canvas=384,
        colour_jitter=0.3,
        paste=0.7,
    ),
    # For the keypoint branch alone, on features that stay as they are.
    "lite-cpu-pose": Recipe(
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.02,
        schedule="cosine",
        warmup_iterations=250,
        gradient_norm=5.0,
        average_decay=0.999,
        batch_size=8,
        keypoint_spread=1.5,
        keypoint_norms=True,
        bfloat16=True,
        canvas=384,
        colour_jitter=0.3,
        paste=0.5,
    ),
}


def recipe_by_name(name: str) -> Recipe:
    """Return a named recipe.

    Raises:
        InputError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r}: no such recipe; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def learning_rate(recipe: Recipe, iteration: int, done: float) -> float:
    """Return the learning rate of an iteration (from 0); ``done`` is the progress, 0..1."""
    warmup = min(1.0, (iteration + 1) / recipe.warmup_iterations)
    if recipe.schedule == "cosine":
        decay = 0.5 + 0.5 * math.cos(math.pi * done)
    else:
        decay = 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9))
    return recipe.learning_rate * warmup * decay


def make_optimizer(network: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer, with parameters grouped by learning rate and weight decay.

    Each group's ``rate`` is its learning rate relative to the schedule's.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = 1.0
        if name.startswith("backbone.body."):
            rate = recipe.backbone_rate
        elif name.startswith("roi_heads.keypoint_"):
            rate = recipe.keypoint_rate
        is_weight = parameter.ndim > 1 or recipe.optimizer == "sgd"
        decay = recipe.weight_decay if is_weight else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    options = [
        {"params": parameters, "rate": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(options, lr=recipe.learning_rate, momentum=0.9)
    return torch.optim.AdamW(options, lr=recipe.learning_rate)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Update an exponential moving average of the weights: ``decay`` of the old average stays."""
    for old, new in zip(average.parameters(), network.parameters(), strict=True):
        if new.requires_grad:
            old.lerp_(new, 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)
