"""The mode in which a pipeline's engine runs, and the classes that are kept."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from maskcast.engines.engine import Detections
from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.stages.infer import labels_of, load_engine_for, mode_for, select


def mode_of(*urls: str, **settings: Any) -> str:
    return mode_for(make_config({"sources": [{"url": url} for url in urls], **settings}))


def test_files_are_run_for_throughput() -> None:
    assert mode_of("a.mp4", "images") == "throughput"


@pytest.mark.parametrize("camera", ["rtsp://cam/1", "/dev/video0", "http://cam/mjpeg", "test://"])
def test_with_a_camera_among_the_sources_the_mode_is_latency(camera: str) -> None:
    assert mode_of("a.mp4", camera) == "latency"


def test_a_camera_may_come_later_where_sources_are_controlled() -> None:
    assert mode_of("a.mp4", control="tcp://127.0.0.1:5600") == "latency"


def test_a_configured_mode_is_used() -> None:
    assert mode_of("a.mp4", model={"mode": "latency"}) == "latency"
    assert mode_of("rtsp://cam/1", model={"mode": "throughput"}) == "throughput"


def test_the_engine_is_loaded_in_that_mode() -> None:
    config = make_config({"sources": [{"url": "a.mp4"}]})
    engine = load_engine_for(config)
    assert engine.max_batch == 2 * len(os.sched_getaffinity(0))
    engine.close()


def test_only_the_chosen_classes_are_kept() -> None:
    detections = Detections(
        images=(),
        boxes=np.arange(12, dtype=np.float32).reshape(3, 4),
        scores=np.float32([0.9, 0.8, 0.7]),
        labels=np.int32([1, 2, 1]),
        image_index=np.int32([0, 0, 1]),
        features=None,
        release=lambda: None,
    )
    labels = labels_of(("person",), ("background", "person", "dog"))
    assert labels is not None
    kept = select(detections, labels)
    assert kept.labels.tolist() == [1, 1]
    assert kept.image_index.tolist() == [0, 1]
    assert kept.boxes[1, 0] == 8


def test_a_class_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(InputError, match="no class 'persn'; did you mean 'person'"):
        labels_of(("persn",), ("background", "person"))
