from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maskcast


def test_one_call_runs_a_clip_and_passes_every_frame_to_the_callback(
    make_clip: Any, timed_engine: Any
) -> None:
    clip, engine = make_clip(frames=6), timed_engine()
    seen = []

    def on_frame(frame: Any, instances: Any, published: Any) -> None:
        seen.append((frame.index, len(instances), frame.image().shape, published.seq))

    stats = maskcast.run(clip, on_frame=on_frame, model=engine)
    assert seen == [(index, 1, (48, 64, 3), index) for index in range(6)]
    assert stats.sources[0].captured == 6
    assert not engine.closed


def test_files_are_written(make_clip: Any, timed_engine: Any, tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"
    maskcast.run([make_clip(frames=4)], model=timed_engine(), jsonl=lines, limit=3)
    assert len(lines.read_text().splitlines()) == 3


def test_an_error_of_the_callback_ends_the_run(make_clip: Any, timed_engine: Any) -> None:
    def on_frame(*_: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        maskcast.run(make_clip(frames=4), on_frame=on_frame, model=timed_engine())


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_the_image_of_a_frame_is_upright(make_clip: Any, timed_engine: Any, rotation: int) -> None:
    def top_is_white(index: int, width: int, height: int) -> Any:
        image = np.zeros((height, width, 3), np.uint8)
        image[: height // 2] = 255
        return image

    clip = make_clip(frames=1, rotation=rotation, draw=top_is_white)
    images = []
    maskcast.run(clip, on_frame=lambda f, *_: images.append(f.image()), model=timed_engine())
    upright = np.rot90(top_is_white(0, 64, 48), rotation // 90)
    assert images[0].shape == upright.shape
    assert np.abs(images[0].astype(int) - upright).mean() < 8
