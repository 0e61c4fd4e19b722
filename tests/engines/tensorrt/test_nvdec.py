"""FFmpeg's NVDEC decoder on the host driver and a double of libnvcuvid, which fills the frames."""

from __future__ import annotations

import ctypes
import logging
import threading

import numpy as np
import pytest
from av.codec.hwaccel import hwdevices_available
from host_tensorrt import HEIGHT, WIDTH, Doubles, make_bundle

from maskcast.engines.tensorrt.device import Gpu
from maskcast.engines.tensorrt.engine import TensorRTEngine
from maskcast.pipeline.cli.profile.decoding import measure_decoding
from maskcast.pipeline.configuration.config import Config, SourceConfig
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.ffmpeg import device_problem, open_device
from maskcast.pipeline.sources.video import VideoSource

pytestmark = [
    pytest.mark.host_gpu,
    pytest.mark.skipif("cuda" not in hwdevices_available(), reason="FFmpeg has no cuda"),
]


@pytest.fixture(autouse=True)
def nvdec(host_driver):
    """Yield the double of libnvcuvid; the process has not looked for the device yet."""
    device_problem.cache_clear()
    double = ctypes.CDLL("libnvcuvid.so.1")
    yield double
    double.host_nvcuvid_break(0)
    device_problem.cache_clear()


@pytest.fixture
def clip(make_clip):
    return make_clip(width=128, height=96, frames=8, bf="0")  # decoded in the order of display


def levels(frame):
    """Return the luma and the chroma of a decoded NV12 frame."""
    y, uv = (np.frombuffer(memoryview(plane), np.uint8) for plane in frame.decoded.planes)
    return int(y[0]), int(uv[0]), int(uv[1])


def test_frames_are_downloaded_as_nv12_in_order(clip):
    with VideoSource(SourceConfig(url=str(clip), decode="cuda")) as source:
        frames = list(source)
    assert [frame.decoder for frame in frames] == ["cuda"] * 8
    assert {frame.decoded.format.name for frame in frames} == {"nv12"}
    assert [levels(frame) for frame in frames] == [(2 + 4 * n, 100 + n, 150 - n) for n in range(8)]


def test_ffmpeg_decodes_in_the_context_of_the_engine(clip):
    gpu = Gpu()
    assert open_device("cuda") == ""
    gpu.close()


def test_a_context_with_other_flags_leaves_decoding_to_software(clip):
    gpu = Gpu()
    ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxSetFlags_v2(0, 0)
    assert open_device("cuda").startswith("the device cannot be opened")
    with VideoSource(SourceConfig(url=str(clip), decode="cuda")) as source:
        assert [frame.decoder for frame in source] == ["software"] * 8
    gpu.close()


def test_what_nvdec_does_not_decode_is_decoded_in_software(make_clip):
    clip = make_clip("a.avi", width=128, height=96, codec="mpeg4", frames=5)
    with VideoSource(SourceConfig(url=str(clip), decode="cuda")) as source:
        assert [frame.decoder for frame in source] == ["software"] * 5


def test_a_decoder_that_gives_no_frame_is_replaced_by_software(clip, nvdec):
    nvdec.host_nvcuvid_break(1)
    with VideoSource(SourceConfig(url=str(clip), decode="cuda")) as source:
        assert [frame.decoder for frame in source] == ["software"] * 8


def test_a_run_on_the_gpu_decodes_there_and_gives_the_network_the_colours(clip, tmp_path, caplog):
    doubles = Doubles()
    engine = TensorRTEngine(make_bundle(tmp_path / "bundle"), open_plans=doubles)
    seen = []
    run = engine._detect_step.run

    def detect(*arguments):
        found = run(*arguments)
        pointer = ctypes.cast(engine._detect_step._images, ctypes.POINTER(ctypes.c_float))
        inputs = np.ctypeslib.as_array(pointer, (len(arguments[0]), 3, HEIGHT, WIDTH))
        seen.extend(inputs[:, :, 5, 5].round().tolist())
        return found

    engine._detect_step.run = detect
    with caplog.at_level(logging.INFO, "maskcast"):
        pipeline = Pipeline(Config(sources=[SourceConfig(url=str(clip))], publish=None), engine)
        pipeline.run()
    engine.close()
    (source,) = pipeline.stats().sources
    assert (source.processed, source.decoder) == (8, "cuda")
    assert "decoded_in_software" not in caplog.text
    for n, rgb in enumerate(seen):
        y, u, v = 1.1644 * (2 + 4 * n - 16), 100 + n - 128, 150 - n - 128
        wanted = [y + 1.596 * v, y - 0.3918 * u - 0.813 * v, y + 2.0172 * u]  # BT.601
        np.testing.assert_allclose(rgb, np.clip(wanted, 0, 255), atol=1)
    assert [error for context in doubles.all_contexts() for error in context.errors] == []


def test_a_profile_compares_nvdec_with_software(clip):
    report = measure_decoding(SourceConfig(url=str(clip)), "cuda", 8, threading.Event())
    assert set(report.alone_ms) == {"software", "cuda"}
    assert "cuda takes" in report.sentence()
