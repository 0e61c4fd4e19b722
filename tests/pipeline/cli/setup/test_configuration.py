from pathlib import Path

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.setup.configuration import check, example, keys
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.configuration.config_file import load_config


def test_the_example_is_a_configuration_of_defaults(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(example())
    assert load_config(path) == Config(sources=["rtsp://192.168.1.20/stream1"])


def test_the_example_names_every_key() -> None:
    text = example()
    for key in keys():
        assert f"{key.name}:" in text


def test_every_key_is_described() -> None:
    assert [key for key in keys() if key.section and not key.text] == []


def test_a_check_says_what_a_configuration_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "door.yaml"
    path.write_text("sources: ['rtsp://me:secret@cam/1']")
    shown = check(path)
    assert "valid" in shown
    assert "tcp://127.0.0.1:5555" in shown
    assert "secret" not in shown


def test_a_check_of_a_wrong_configuration_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "door.yaml"
    path.write_text("sources: [{url: a, polcy: latest}]")
    with pytest.raises(InputError, match="did you mean 'policy'"):
        check(path)
