"""What a profile reports about decoding by hardware."""

from __future__ import annotations

import threading

import pytest

from maskcast.pipeline.cli.profile import decoding
from maskcast.pipeline.cli.profile.decoding import DecoderTimes, DecodingReport, measure_decoding
from maskcast.pipeline.configuration.config import DECODE_DEVICES, SourceConfig
from maskcast.pipeline.sources.ffmpeg import device_problem

SOFTWARE = DecoderTimes(2.0, 6.0)


@pytest.mark.parametrize(
    ("cuda", "verdict"),
    [
        (DecoderTimes(0.5, 0.25), "it helps"),
        (DecoderTimes(3.0, 0.25), "it saves processor time, but is slower"),
        (DecoderTimes(0.5, 7.0), "it does not help"),
    ],
)
def test_hardware_is_compared_with_software(cuda, verdict) -> None:
    report = DecodingReport("cuda", {"software": SOFTWARE, "cuda": cuda}, {"vaapi": "no device"})
    assert report.sentence() == (
        f"decoded by cuda; cuda takes {cuda.wall:.2f} ms per frame and {cuda.processor:.2f} ms of "
        f"processor time, software 2.00 and 6.00: {verdict}; vaapi: no device"
    )


@pytest.mark.skipif(
    not all(map(device_problem, DECODE_DEVICES)), reason="this machine decodes by hardware"
)
def test_without_hardware_nothing_is_decoded_again(make_clip) -> None:
    config = SourceConfig(url=str(make_clip()))
    report = measure_decoding(config, "software", 10, threading.Event())
    assert report.alone_ms == {}
    assert set(report.absent) == set(DECODE_DEVICES)
    assert report.sentence().startswith("in software; cuda: ")


def test_a_device_that_leaves_a_video_to_software_is_named(make_clip, monkeypatch) -> None:
    monkeypatch.setattr(
        decoding, "device_problem", lambda device: "" if device == "vaapi" else "none"
    )
    if not device_problem("vaapi"):
        pytest.skip("this machine decodes with vaapi")
    config = SourceConfig(url=str(make_clip()))
    report = measure_decoding(config, "software", 10, threading.Event())
    assert set(report.alone_ms) == {"software"}
    assert report.alone_ms["software"].wall > 0
    assert report.absent["vaapi"] == "it does not decode this video"


def test_a_camera_is_not_read_twice(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "device_problem", lambda device: "")
    config = SourceConfig(url="rtsp://127.0.0.1:9/cam")
    report = measure_decoding(config, "cuda", None, threading.Event())
    assert report.alone_ms == {}
    assert report.sentence().startswith("decoded by cuda; cuda: compared on files only")
