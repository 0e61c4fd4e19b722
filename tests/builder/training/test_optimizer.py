import pytest
import torch
from torch import nn

from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.optimizer import make_optimizer, update_average
from maskcast.builder.training.recipe import RECIPES


def test_adamw_decays_weights_alone_and_slows_the_backbone() -> None:
    network = build_network(network_config("lite0-fpn", ("person",)))
    network.backbone.body._conv_stem.requires_grad_(False)
    optimizer = make_optimizer(network, RECIPES["lite-cpu"])
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in group_of
            continue
        group = group_of[id(parameter)]
        assert group["rate"] == (0.25 if name.startswith("backbone.body.") else 1.0)
        assert group["weight_decay"] == (0.02 if parameter.ndim > 1 else 0.0)


def test_the_papers_sgd_has_momentum_and_decays_all() -> None:
    network = build_network(network_config("lite0-fpn", ("person",), with_masks=False))
    optimizer = make_optimizer(network, RECIPES["paper"])
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["weight_decay"], g["rate"]) for g in optimizer.param_groups} == {
        (0.9, 1e-4, 1.0)
    }


def test_the_average_approaches_constant_weights_geometrically() -> None:
    average, network = nn.Linear(2, 1), nn.Linear(2, 1)
    nn.init.zeros_(average.weight)
    nn.init.ones_(network.weight)
    for _ in range(3):
        update_average(average, network, 0.5)
    assert average.weight.detach().numpy() == pytest.approx(0.875)


def test_the_average_takes_buffers_as_they_are() -> None:
    average, network = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    network.running_mean.fill_(3.0)
    update_average(average, network, 0.9)
    assert average.running_mean.item() == 3.0
