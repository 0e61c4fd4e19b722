import re
import shutil
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from maskcast.builder.checkpoint.checkpoint import TORCHVISION
from maskcast.builder.commands import mount
from maskcast.builder.network.network import PRESETS
from maskcast.engines.bundle import default_bundle
from maskcast.engines.errors import InputError


def models(*folders: Path) -> Result:
    app = Typer()
    mount(app)
    arguments = ["models", *map(str, folders)]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def names(result: Result, purpose: str) -> list[str]:
    lines = [line.split() for line in result.stdout.splitlines()]
    return [words[1] for words in lines if words[0] == purpose]


def test_every_model_has_its_line() -> None:
    result = models()
    assert names(result, "run") == ["default"]
    assert names(result, "build") == [*TORCHVISION, "FILE"]
    assert names(result, "train") == [*PRESETS]
    assert re.search(
        r"person-lite0: person \(boxes, masks.*\), longer side \d+ pixels, int8", result.stdout
    )
    assert "resnet50-fpn-v2, 80 classes, downloads 177 MB" in result.stdout


def test_the_bundles_of_a_folder_are_listed_and_damage_is_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        shutil.copytree(default_bundle(), tmp_path / name)
    (tmp_path / "b" / "detector.onnx").write_bytes(b"")
    (tmp_path / "others").mkdir()
    result = models(tmp_path)
    assert names(result, "run") == ["default", str(tmp_path / "a"), str(tmp_path / "b")]
    (damaged,) = [line for line in result.stdout.splitlines() if "damaged" in line]
    assert f"{tmp_path}/b" in damaged
    assert names(models(tmp_path / "a"), "run") == ["default", str(tmp_path / "a")]


def test_a_folder_without_bundles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="contains no bundle; give a bundle or a folder of bundles"
    ):
        models(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        models(tmp_path / "gone")
