import msgspec
import pytest
import torch
from torch import nn

from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.recipe import (
    RECIPES,
    Recipe,
    learning_rate,
    make_optimizer,
    recipe_by_name,
    update_average,
)
from maskcast.engines.errors import InputError


def test_the_paper_recipe_scales_the_papers_rate_to_its_batch() -> None:
    paper = recipe_by_name("paper")
    assert paper.learning_rate / paper.batch_size == pytest.approx(0.02 / 16)
    assert paper.weight_decay == 1e-4
    assert paper.optimizer == "sgd"


def test_the_rate_rises_linearly_during_the_warm_up() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_iterations=10)
    assert learning_rate(recipe, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(recipe, 4, 0.0) == pytest.approx(0.5)
    assert learning_rate(recipe, 9, 0.0) == learning_rate(recipe, 100, 0.1) == 1.0


def test_the_step_schedule_falls_to_a_tenth_after_two_thirds_and_again_after_eight_ninths() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_iterations=1)
    assert [learning_rate(recipe, 99, done) for done in (0.6, 0.7, 0.8, 0.9)] == pytest.approx(
        [1.0, 0.1, 0.1, 0.01]
    )


def test_the_cosine_falls_to_zero_through_one_half() -> None:
    recipe = Recipe(learning_rate=2.0, warmup_iterations=1, schedule="cosine")
    assert learning_rate(recipe, 9, 0.5) == pytest.approx(1.0)
    assert learning_rate(recipe, 9, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_msgpack(name: str) -> None:
    assert msgspec.convert(msgspec.to_builtins(RECIPES[name]), Recipe) == RECIPES[name]


def test_an_unknown_recipe_is_an_input_error_that_lists_them() -> None:
    with pytest.raises(InputError, match="lite-cpu"):
        recipe_by_name("quick")


def test_adamw_decays_only_weights_and_slows_the_backbone() -> None:
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


def test_the_papers_sgd_has_momentum_and_decays_all_parameters() -> None:
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
