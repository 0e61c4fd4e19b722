"""The whole pipeline on the GPU engine, on the host driver."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from host_tensorrt import MAX_BATCH, Doubles, make_bundle

from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.engines.tensorrt.engine import TensorRTEngine
from maskcast.engines.tensorrt.plan import DeviceError
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.pipeline import Pipeline

pytestmark = [pytest.mark.host_gpu, pytest.mark.timeout(120)]

FRAMES = 40


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def engine(host_driver, bundle):
    engine = TensorRTEngine(bundle, open_plans=Doubles())
    yield engine
    engine.close()


def configured(make_clip):
    """Configure two clips whose frames grow brighter, so that later ones score higher."""
    clips = [make_clip(f"{name}.mp4", frames=FRAMES) for name in "ab"]
    sources = [{"url": str(clip), "decode": "software"} for clip in clips]
    return make_config({"sources": sources, "publish": None})


class Seen(dict):
    """Instances by source and frame."""

    def __call__(self, frame, instances, published):
        self[frame.source, frame.index] = instances


def test_every_frame_of_two_sources_gets_what_the_cpu_engine_finds(engine, bundle, make_clip):
    config = configured(make_clip)
    found, wanted = Seen(), Seen()
    sizes = []
    detect = engine.detect
    engine.detect = lambda images, score: sizes.append(len(images)) or detect(images, score)
    Pipeline(config, engine, on_frame=found).run()
    cpu = OpenVinoEngine(bundle)
    Pipeline(config, cpu, on_frame=wanted).run()
    cpu.close()
    assert len(found) == 2 * FRAMES
    assert found.keys() == wanted.keys()
    assert len({len(instances) for instances in found.values()}) > 1
    assert max(sizes) > 1  # frames of both sources went up together
    assert max(sizes) <= MAX_BATCH
    for key, instances in found.items():
        np.testing.assert_allclose(instances.boxes, wanted[key].boxes, atol=1e-3)
        np.testing.assert_array_equal(instances.labels, wanted[key].labels)
        difference = instances.masks.astype(int) - wanted[key].masks
        assert np.abs(difference).max(initial=0) <= 1


def test_every_image_is_uploaded_once_ahead_of_its_batch(engine, host_driver, make_clip):
    detected, late, buckets = [], [], []
    detect, segment, ring = engine.detect, engine.segment, engine._images

    def watch(images, score):
        late.extend(image for image in images if id(image) not in ring._ahead)
        detected.extend(images)
        return detect(images, score)

    def count(detections):
        boxes = len(detections.boxes)
        buckets.extend([next(n for n in (1, 2, 4, 8, 12) if n >= boxes)] * (boxes > 0))
        return segment(detections)

    engine.detect, engine.segment = watch, count
    before = host_driver.report()
    Pipeline(configured(make_clip), engine).run()
    after = host_driver.report()
    assert len(detected) == 2 * FRAMES
    assert late == []
    assert len(set(buckets)) > 1
    graphs = after["graph launches"] - before["graph launches"]
    # Every batch has one copy of its sizes and one of its boxes, arrays rounded up to 256 bytes.
    boxes = sum(sum(-(-n * size // 256) * 256 for size in (16, 8, 4)) for n in buckets)
    planes = 64 * 48 * 3 // 2  # as the clips are decoded
    up = len(detected) * planes + 256 * (graphs - len(buckets)) + boxes
    assert after["bytes up"] - before["bytes up"] == up


def test_stopping_a_running_pipeline_leaves_nothing_on_the_device(engine, make_clip):
    started = threading.Event()
    pipeline = Pipeline(configured(make_clip), engine, on_frame=lambda *_: started.set())
    pipeline.start()
    assert started.wait(60)
    pipeline.stop()
    pipeline.join()  # the fixtures check that all memory is freed
    assert engine._slots.qsize() == 3


def test_a_device_that_fails_while_running_ends_the_run_with_its_error(
    engine, make_clip, host_driver
):
    def fail(frame, instances, published):
        if frame.index == 10:
            host_driver.break_down()

    with pytest.raises(DeviceError, match="the GPU failed to"):
        Pipeline(configured(make_clip), engine, on_frame=fail).run()
    host_driver.break_down(0)
    assert engine._slots.qsize() == 3
