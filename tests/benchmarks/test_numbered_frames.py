from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from benchmarks import numbered_frames as numbered
from maskcast.engines.engine import Mode
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.pipeline.configuration.config import SourceConfig


def test_a_number_survives_scaling_and_jpeg(tmp_path: Path) -> None:
    for source, number in ((1, 0), (15, 0xFFFFFF), (6, 123_456)):
        image = Image.fromarray(numbered.draw_number(source, number)).resize((200, 100))
        image.save(tmp_path / "frame.jpg", quality=60)
        assert numbered.read_number(np.asarray(Image.open(tmp_path / "frame.jpg"))) == (
            source,
            number,
        )
    assert numbered.read_number(np.full((192, 320, 3), 255, np.uint8)) is None


@pytest.mark.parametrize("mode", get_args(Mode))
def test_header_image_and_instances_belong_together(tmp_path: Path, mode: Mode) -> None:
    clips = [numbered.make_clip(tmp_path / f"{n}.mp4", n, 60) for n in (1, 2)]
    sources = [
        SourceConfig(url=str(clips[0]), name="film"),
        SourceConfig(url=str(clips[1]), name="third", every_nth=3),
    ]
    tally = numbered.Tally()
    numbered.run(sources, {"film": 1, "third": 2}, mode, tally, delay_s=0.001)
    assert tally.frames == 60 + 20
    assert tally.mismatches == []


def test_a_camera_that_reconnects_keeps_them_together(rtsp_server: Any) -> None:
    rtsp_server.start(
        "--numbered", "4", "--width", "320", "--height", "192", "--fps", "50", "--frames", "40"
    )
    tally = numbered.Tally()
    sources = [SourceConfig(url=rtsp_server.url, name="cam")]
    numbered.run(sources, {"cam": 4}, "throughput", tally, limit=60, delay_s=0.001)
    # A slow machine drops most frames, and those around the reconnect cannot be counted.
    assert tally.restarts >= 1
    assert tally.frames >= 2
    assert tally.mismatches == []


def test_answers_in_the_wrong_order_are_mismatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side_by_side = OpenVinoEngine._side_by_side

    def swap(engine: Any, run: Any, count: int) -> Any:
        return side_by_side(engine, run, count)[::-1]

    monkeypatch.setattr(OpenVinoEngine, "_side_by_side", swap)
    tally = numbered.Tally()
    sources = [SourceConfig(url=str(numbered.make_clip(tmp_path / "1.mp4", 1, 20)), name="film")]
    numbered.run(sources, {"film": 1}, "throughput", tally)
    assert tally.mismatches
