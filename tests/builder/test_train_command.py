from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from maskcast.builder.commands import mount
from maskcast.builder.training import train as train_module
from maskcast.builder.training.config import TrainConfig
from maskcast.builder.training.recipe import RECIPES
from maskcast.engines.errors import InputError

REQUIRED = ("train", "--images", "photos", "--out", "run")
ANNOTATIONS = ("--annotations", "a.json")


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch):
    """Run the command, without the training; return what it would train."""
    configs: list[TrainConfig] = []

    def keep(config: TrainConfig) -> Path:
        configs.append(config)
        return Path("model.pth")

    monkeypatch.setattr(train_module, "train", keep)
    app = Typer()
    mount(app)

    def invoke(*options: str) -> TrainConfig:
        given = [] if "--keypoints" in options else ANNOTATIONS
        CliRunner().invoke(app, [*REQUIRED, *given, *options], catch_exceptions=False)
        return configs.pop()

    return invoke


def test_options_change_the_recipe_of_the_network(configured) -> None:
    recipe = configured().recipe
    assert (recipe.batch_size, recipe.learning_rate) == (4, 3e-4)
    config = configured("--batch-size", "6", "--lr", "1e-3", "--iterations", "50")
    assert (config.recipe.batch_size, config.recipe.learning_rate) == (6, 1e-3)
    assert config.iterations == 50
    assert config.recipe.epochs == recipe.epochs


def test_two_lengths_of_a_run_are_refused(configured) -> None:
    with pytest.raises(InputError, match=r"--epochs, --iterations, --minutes: .*; give one"):
        configured("--epochs", "2", "--minutes", "5")


def test_keypoints_without_annotations_have_a_recipe_of_their_own(configured) -> None:
    alone = configured("--keypoints", "k.json", "--keypoints", "l.json", "--initial", "default")
    assert alone.annotations is None
    assert alone.keypoint_annotations == (Path("k.json"), Path("l.json"))
    assert alone.recipe == RECIPES["lite-cpu-pose"]
    together = configured("--keypoints", "k.json", *ANNOTATIONS)
    assert together.annotations == Path("a.json")
    assert together.recipe == RECIPES["lite-cpu"]
    assert configured().keypoint_annotations == ()
