"""Decoding by hardware on machines without such hardware, with the real FFmpeg."""

from __future__ import annotations

import pytest

from maskcast.pipeline.configuration.config import DECODE_DEVICES, SourceConfig
from maskcast.pipeline.sources import ffmpeg, video
from maskcast.pipeline.sources.ffmpeg import device_problem
from maskcast.pipeline.sources.video import VideoSource


@pytest.fixture(params=DECODE_DEVICES)
def absent_device(request):
    if not device_problem(request.param):
        pytest.skip(f"this machine decodes with {request.param}")
    return request.param


def test_an_absent_device_has_a_reason_of_one_line(absent_device) -> None:
    reason = device_problem(absent_device)
    assert "\n" not in reason
    assert any(known in reason for known in ("built without", "no NVIDIA driver", "be opened"))


def test_a_device_is_tried_once(monkeypatch) -> None:
    device_problem.cache_clear()
    tried: list[str] = []
    monkeypatch.setattr(ffmpeg, "open_device", lambda device: tried.append(device) or "none")
    try:
        assert [device_problem("cuda"), device_problem("cuda")] == ["none", "none"]
    finally:
        device_problem.cache_clear()
    assert tried == ["cuda"]


def test_without_the_device_a_video_is_decoded_in_software(make_clip, absent_device) -> None:
    config = SourceConfig(url=str(make_clip(frames=5)), decode=absent_device)
    with VideoSource(config) as source:
        assert [frame.decoder for frame in source] == ["software"] * 5


def test_a_device_that_is_lost_during_the_run_ends_no_source(
    make_clip, absent_device, monkeypatch
) -> None:
    # It was found when the process looked for it; now FFmpeg fails to open it.
    monkeypatch.setattr(video, "device_problem", lambda device: "")
    config = SourceConfig(url=str(make_clip(frames=5)), decode=absent_device)
    with VideoSource(config) as source:
        assert [frame.decoder for frame in source] == ["software"] * 5


def test_a_device_that_gives_no_frame_ends_no_source(make_clip, monkeypatch) -> None:
    monkeypatch.setattr(video, "device_problem", lambda device: "")
    monkeypatch.setattr(VideoSource, "_accelerator", lambda self: None)
    decode = VideoSource._decode

    def decode_by_device(source: VideoSource, stream):
        if source._device is None:
            yield from decode(source, stream)

    monkeypatch.setattr(VideoSource, "_decode", decode_by_device)
    config = SourceConfig(url=str(make_clip(frames=5)), decode="cuda", loop=True)
    with VideoSource(config) as source:
        frames = iter(source)
        assert [next(frames).index for _ in range(7)] == list(range(7))
