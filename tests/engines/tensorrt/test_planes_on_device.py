"""Decoded images whose planes are uploaded, and which the GPU resizes and converts."""

from __future__ import annotations

import ctypes
import logging

import av
import numpy as np
import pytest
from host_tensorrt import HEIGHT, MAX_BATCH, WIDTH, Doubles, make_bundle

from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage, PlanarImage
from maskcast.engines.tensorrt.device import Memory
from maskcast.engines.tensorrt.engine import MAX_PLANE_BYTES, TensorRTEngine

pytestmark = pytest.mark.host_gpu


@pytest.fixture
def engine(host_driver, tmp_path):
    doubles = Doubles()
    engine = TensorRTEngine(make_bundle(tmp_path / "bundle"), open_plans=doubles)
    yield engine
    engine.close()
    assert [error for context in doubles.all_contexts() for error in context.errors] == []


def decoded(height, width, pixel_format="nv12", seed=0):
    """Return a frame of random luma and constant chroma, so that no filter changes the chroma."""
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixel_format)
    for index, plane in enumerate(frame.planes):
        memory = np.ndarray((plane.height, plane.line_size), np.uint8, memoryview(plane))
        memory[:] = rng.integers(60, 200, memory.shape) if index == 0 else 120 + 10 * index
    return frame


def network_inputs(engine, count):
    """Return what the last ``detect`` gave the network, ``[count, H, W, 3]``.

    libswscale's tables, which make ``pixels``, are off by up to 3 levels.
    """
    pointer = ctypes.cast(engine._detect_step._images, ctypes.POINTER(ctypes.c_float))
    inputs = np.ctypeslib.as_array(pointer, (count, 3, HEIGHT, WIDTH))
    return inputs.transpose(0, 2, 3, 1)


def assert_inputs(engine, images):
    engine.segment(engine.detect(images, 0.1))
    for found, image in zip(network_inputs(engine, len(images)), images, strict=True):
        np.testing.assert_allclose(found, image.pixels.astype("f4"), atol=4)


def make_images(engine, seed=0):
    """Return a batch of two formats with planes and one without, in several sizes and rotations."""
    frames = [
        (decoded(96, 128, "nv12", seed), 0),
        (decoded(65, 97, "rgb24", seed), 0),
        (decoded(301, 205, "yuv420p", seed), 90),
        (decoded(500, 700, "nv12", seed), 180),
    ]
    return [engine.fit(*frame) for frame in frames]


def test_the_network_gets_what_libswscale_would_give_it(engine):
    images = make_images(engine)
    kinds = [type(image) for image in images]
    assert kinds == [PlanarImage, NetworkImage, PlanarImage, PlanarImage]
    assert_inputs(engine, images)
    for image in images:
        assert_inputs(engine, [image])
    assert_inputs(engine, images[::-1])


def test_prefetched_planes_give_the_same(engine, host_driver):
    batches = [make_images(engine, seed) for seed in range(4)]
    for image in batches[0]:
        engine.prefetch(image)
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        for image in following:
            engine.prefetch(image)
        before = host_driver.report()["bytes up"]
        detections = engine.detect(batch, 0.1)
        assert host_driver.report()["bytes up"] - before == 256  # their sizes alone
        engine.segment(detections)
        for found, image in zip(network_inputs(engine, MAX_BATCH), batch, strict=True):
            np.testing.assert_allclose(found, image.pixels.astype("f4"), atol=4)


def test_planes_are_uploaded_with_one_and_a_half_bytes_per_pixel(engine, host_driver):
    before = host_driver.report()
    engine.prefetch(engine.fit(decoded(480, 640), 0))
    engine.prefetch(engine.fit(decoded(47, 63), 0))
    after = host_driver.report()
    assert after["bytes up"] - before["bytes up"] == 480 * 640 * 3 // 2 + 47 * 63 + 2 * 24 * 32


def test_a_slot_that_has_grown_is_used_again(engine, host_driver):
    def allocations():
        report = host_driver.report()
        return report["device allocations"], report["pinned allocations"]

    before = allocations()
    for seed in range(5):
        for _ in range(2 * MAX_BATCH + 1):
            engine.prefetch(engine.fit(decoded(700, 900, seed=seed), 0))
    assert allocations() == before  # each slot has one of each, larger than at first
    image = engine.fit(decoded(700, 900, seed=9), 0)
    assert_inputs(engine, [image])


def test_without_memory_for_planes_libswscale_resizes(engine, monkeypatch, caplog):
    def refuse(self, shape, dtype):
        raise InputError("the GPU has 1 MB free")

    monkeypatch.setattr(Memory, "device", refuse)
    images = [engine.fit(decoded(700, 900, seed=seed), 0) for seed in range(MAX_BATCH)]
    with caplog.at_level(logging.WARNING, "maskcast"):
        assert_inputs(engine, images)
    assert [record.getMessage() for record in caplog.records] == ["image_resized_on_host"]
    np.testing.assert_array_equal(network_inputs(engine, 1)[0], images[0].pixels)


def test_planes_of_very_large_images_stay_on_the_host(engine):
    frame = av.VideoFrame(4096, 2306, "nv12")
    assert MAX_PLANE_BYTES < 4096 * 2306 * 3 // 2
    assert not isinstance(engine.fit(frame, 0), PlanarImage)
