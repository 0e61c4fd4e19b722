import msgspec
import pytest

from maskcast.builder.training.recipe import RECIPES, Recipe, learning_rate, recipe_by_name
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


def test_steps_are_tenths_after_two_and_after_eight_parts() -> None:
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
