"""The optimiser of a training run, and the average of the weights that it makes."""

from typing import Any

import torch
from torch import nn

from maskcast.builder.training.recipe import Recipe


def make_optimizer(network: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Group the trainable parameters by learning rate and weight decay.

    Each group's ``rate`` is its learning rate as a part of the schedule's.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = recipe.backbone_rate if name.startswith("backbone.body.") else 1.0
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
    """Move the average of the weights towards the network's: ``decay`` of the old one stays."""
    for old, new in zip(average.parameters(), network.parameters(), strict=True):
        if new.requires_grad:
            old.lerp_(new, 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)
