from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.setup.zones import choose_source, draw_zones

CONFIG = """
sources:
  - url: {clip}
    name: cam
    zones: [{{name: door, polygon: [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}}]
    lines: [{{name: gate, points: [[0.75, 0.1], [0.75, 0.9]]}}]
"""


@pytest.fixture
def config(make_clip, tmp_path: Path) -> Path:
    clip = make_clip("cam.mp4", frames=3, width=320, height=240)
    path = tmp_path / "zones.yaml"
    path.write_text(CONFIG.format(clip=clip))
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def test_the_grid_is_drawn_at_tenths(make_clip, tmp_path: Path) -> None:
    clip = make_clip("cam.mp4", frames=3, width=320, height=240)
    draw_zones(str(clip), None, tmp_path / "out.png")
    shown = pixels(tmp_path / "out.png")
    assert shown.shape == (240, 320, 3)
    row = shown[203].sum(axis=1)
    assert row[160] > row[150] + 60
    assert row[32] > row[45] + 30


def test_zones_and_lines_are_drawn_into_the_frame(config: Path, tmp_path: Path) -> None:
    plain, drawn = tmp_path / "plain.png", tmp_path / "drawn.png"
    source = draw_zones(None, config, drawn)
    draw_zones(source.url, None, plain)
    changed = (pixels(plain) != pixels(drawn)).any(axis=2)
    assert changed[60:, :158].mean() > 0.95
    assert not changed[:, 280:].any()
    assert changed[30:210, 240].all()
    assert changed[120, 245]  # the arrow points forward: right of a line from top to bottom
    assert not changed[120, 170:235].any()


def test_a_source_is_chosen_by_its_name_or_url(config: Path) -> None:
    assert choose_source("cam", config).name == "cam"
    assert choose_source(choose_source("cam", config).url, config).name == "cam"


def test_what_is_missing_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no source 'door'; it has: cam"):
        choose_source("door", config)
    with pytest.raises(InputError, match="no source: give a clip"):
        choose_source(None, None)
    with pytest.raises(InputError, match="no such file"):
        draw_zones("nothing.mp4", None, tmp_path / "out.png")
    with pytest.raises(InputError, match=r"absent/out\.png: cannot be written"):
        draw_zones(None, config, tmp_path / "absent" / "out.png")


def test_a_mistake_in_the_configuration_is_named(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace("0.5, 1]", "0.5, 2]"))
    with pytest.raises(InputError, match=r"zone 'door': .* outside the frame"):
        draw_zones(None, config, tmp_path / "out.png")


def test_a_camera_that_does_not_answer_is_an_error(free_port: int, tmp_path: Path) -> None:
    url = f"rtsp://127.0.0.1:{free_port}/cam"
    config = tmp_path / "camera.yaml"
    config.write_text(f"sources: [{{url: '{url}', open_timeout_s: 0.5}}]")
    with pytest.raises(InputError, match=r"no frame within 0\.5 s"):
        draw_zones(None, config, tmp_path / "out.png")
