"""A user's program, whose asserted types mypy and pyright check (test_package.py)."""

from typing import assert_type

import numpy as np
import numpy.typing as npt

import maskcast


def count(endpoint: str) -> int:
    total = 0
    for frame in maskcast.subscribe(endpoint):
        assert_type(frame, maskcast.PublishedFrame)
        assert_type(frame.instances, maskcast.Instances)
        assert_type(frame.instances.boxes, npt.NDArray[np.float32])
        assert_type(frame.source, str)
        total += len(frame.instances)
    return total


async def count_events(endpoint: str) -> int:
    total = 0
    async for received in maskcast.subscribe(endpoint, events=True):
        assert_type(received, maskcast.PublishedFrame | maskcast.StreamEvent)
        total += isinstance(received, maskcast.StreamEvent)
    return total


def find_people(rgb: npt.NDArray[np.uint8]) -> maskcast.Instances:
    engine = maskcast.load_engine("default")
    found = maskcast.predict(rgb, engine)
    return found[found.scores > 0.9]


def count_in_a_clip(path: str) -> int:
    total = 0

    def add(
        frame: maskcast.Frame, instances: maskcast.Instances, published: maskcast.Published
    ) -> None:
        nonlocal total
        assert_type(frame.image(), npt.NDArray[np.uint8])
        total += len(instances)

    stats = maskcast.run(path, on_frame=add)
    assert_type(stats, maskcast.Stats)
    return total


def build_a_pipeline() -> maskcast.Pipeline:
    config = maskcast.Config(
        sources=["clip.mp4", maskcast.SourceConfig(url="rtsp://camera/1", name="door")],
        publish=maskcast.PublishConfig(masks="crop_bits"),
    )
    assert_type(config.sources, tuple[maskcast.SourceConfig, ...])
    return maskcast.Pipeline(config)
