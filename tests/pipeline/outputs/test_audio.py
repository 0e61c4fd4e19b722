"""Audio that is copied into saved video."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from maskcast.pipeline.configuration.config import Config, OutputConfig, SourceConfig
from maskcast.pipeline.outputs.audio import audio_file
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stages.decode import DecodeStage

FPS, RATE = 25, 48_000
Packets = list[tuple[float, bytes]]


@pytest.fixture
def make_clip_with_audio(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a video of 3 s with a rising tone from frame ``begin`` on."""

    def make(name: str, codec: str, begin: int = 0) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=FPS)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream(codec, rate=RATE)
            audio.layout = "mono"
            resampler = av.AudioResampler(audio.codec_context.format.name, "mono", RATE)
            for index in range(3 * FPS):
                pixels = np.full((48, 64, 3), 3 * index, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, FPS)
                container.mux(video.encode(frame))
                if index < begin:
                    continue
                at_s = (np.arange(RATE // FPS) + index * RATE // FPS) / RATE
                tone = (9000 * np.sin(700 * at_s * (1 + at_s))).astype(np.int16)[None]
                sound = av.AudioFrame.from_ndarray(tone, "s16", "mono")
                sound.rate, sound.time_base = RATE, Fraction(1, RATE)
                sound.pts = index * RATE // FPS
                for resampled in resampler.resample(sound):
                    container.mux(audio.encode(resampled))
            container.mux(video.encode(None))
            container.mux(audio.encode(None))
        return path

    return make


def read(path: Path) -> tuple[list[float], Packets]:
    """Return the times of the frames, and the audio packets with theirs, seconds."""
    with av.open(str(path)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        streams = container.streams.audio
        packets = [
            (float(packet.pts * packet.time_base), bytes(packet))
            for packet in (container.demux(streams[0]) if streams else ())
            if packet.pts is not None
        ]
    return times, packets


def save(clip: Path, out: Path, engine, limit: int | None = None, **keys: object) -> None:
    outputs = OutputConfig(save=str(out), segment=keys.pop("segment", None))
    source = SourceConfig(url=str(clip), **keys)
    config = Config(sources=(source,), publish=None, outputs=outputs)
    Pipeline(config, engine, limit=limit).run()


def not_recorded(caplog) -> list[dict[str, object]]:
    return [r.fields for r in caplog.records if r.getMessage() == "audio_not_recorded"]


@pytest.mark.parametrize(
    ("name", "codec", "out", "begin"),
    [
        ("clip.mp4", "aac", "out.mp4", 0),
        ("clip.mp4", "aac", "out.mkv", 0),
        ("clip.mkv", "libopus", "out.mkv", 0),
        ("clip.mkv", "ac3", "out.mp4", 25),
        ("clip.ts", "mp2", "out.mp4", 0),  # its first frame is at about 1.4 s
    ],
)
def test_the_audio_of_a_file_is_copied_and_stays_at_its_frames(
    name: str,
    codec: str,
    out: str,
    begin: int,
    make_clip_with_audio,
    timed_engine,
    tmp_path: Path,
    caplog,
) -> None:
    clip = make_clip_with_audio(name, codec, begin)
    save(clip, tmp_path / out, timed_engine())
    given_times, given = read(clip)
    times, copied = read(tmp_path / out)
    assert len(times) == 3 * FPS
    begin_s = given_times[0]
    wanted = [(at_s - begin_s, data) for at_s, data in given if -1e-4 < at_s - begin_s < 3]
    assert [data for _, data in copied] == [data for _, data in wanted]
    for (at_s, _), (wanted_s, _) in zip(copied, wanted, strict=True):
        # Matroska stores milliseconds; packets of mp2 begin between two of them.
        assert at_s - times[0] == pytest.approx(wanted_s, abs=0.0021)
    assert not_recorded(caplog) == []


def test_segments_share_the_audio_without_a_gap(
    make_clip_with_audio, timed_engine, tmp_path: Path
) -> None:
    clip = make_clip_with_audio("clip.mp4", "aac")
    save(clip, tmp_path / "out.mkv", timed_engine(), segment="1s")
    paths = sorted(tmp_path.glob("out-*.mkv"), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) == 3
    parts = [read(path) for path in paths]
    together = [data for _, packets in parts for _, data in packets]
    assert together == [data for at_s, data in read(clip)[1] if at_s > -1e-4]
    for times, packets in parts:
        assert packets[0][0] - times[0] < 0.03
        assert packets[-1][0] <= times[-1] + 1 / FPS


def test_the_audio_ends_with_the_last_frame(
    make_clip_with_audio, timed_engine, tmp_path: Path
) -> None:
    clip = make_clip_with_audio("clip.mp4", "aac")
    save(clip, tmp_path / "out.mp4", timed_engine(), limit=25)
    times, packets = read(tmp_path / "out.mp4")
    assert len(times) == 25
    assert 0.9 < packets[-1][0] < 1.0


def test_audio_that_the_file_cannot_hold_is_left_out_and_logged(
    make_clip_with_audio, timed_engine, tmp_path: Path, caplog
) -> None:
    clip = make_clip_with_audio("clip.ts", "aac")  # has its parameters in each packet
    save(clip, tmp_path / "out.mp4", timed_engine())
    times, packets = read(tmp_path / "out.mp4")
    assert (len(times), packets) == (3 * FPS, [])
    assert [shown["source"] for shown in not_recorded(caplog)] == ["clip"]


def test_segments_that_cannot_hold_the_audio_are_logged_once(
    make_clip_with_audio, timed_engine, tmp_path: Path, caplog
) -> None:
    save(make_clip_with_audio("clip.ts", "aac"), tmp_path / "out.mp4", timed_engine(), segment="1s")
    assert len(list(tmp_path.glob("out-*.mp4"))) == 3
    assert len(not_recorded(caplog)) == 1


def test_audio_that_breaks_off_leaves_the_video_whole(
    make_clip_with_audio, timed_engine, tmp_path: Path, caplog
) -> None:
    clip = make_clip_with_audio("clip.mkv", "aac")
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 2 // 3])
    save(clip, tmp_path / "out.mp4", timed_engine())
    times, packets = read(tmp_path / "out.mp4")
    assert 20 < len(times) < 3 * FPS
    assert packets


@pytest.mark.parametrize("saves", [True, False])
def test_a_looped_file_has_no_audio_and_that_is_logged(
    saves: bool, make_clip_with_audio, timed_engine, tmp_path: Path, caplog
) -> None:
    clip = make_clip_with_audio("clip.mp4", "aac")
    outputs = OutputConfig(save=str(tmp_path / "out.mp4")) if saves else OutputConfig()
    source = SourceConfig(url=str(clip), loop=True)
    config = Config(sources=(source,), publish=None, outputs=outputs)
    Pipeline(config, timed_engine(), limit=5).run()
    assert [shown["source"] for shown in not_recorded(caplog)] == (["clip"] if saves else [])


def test_only_local_video_files_are_sources_of_audio(tmp_path: Path) -> None:
    (tmp_path / "a:b.mp4").touch()
    assert audio_file(SourceConfig(url=f"{tmp_path}/a:b.mp4")) == tmp_path / "a:b.mp4"
    assert audio_file(SourceConfig(url=f"{tmp_path}/a:b.mp4", loop=True)) is None
    for url in (str(tmp_path), f"{tmp_path}/missing.mp4", "/dev/video0", "rtsp://camera/1"):
        assert audio_file(SourceConfig(url=url)) is None


def test_missing_audio_is_not_the_reason_of_a_later_failure(
    make_clip_with_audio, timed_engine, tmp_path: Path, monkeypatch, caplog
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect of a library")

    monkeypatch.setattr(DecodeStage, "_read", fail)
    clip = make_clip_with_audio("clip.mp4", "aac")
    with caplog.at_level(logging.INFO, "maskcast"), pytest.raises(ZeroDivisionError):
        save(clip, tmp_path / "out.mp4", timed_engine(), loop=True)
    assert len(not_recorded(caplog)) == 1
    states = [r.fields for r in caplog.records if r.getMessage() == "source_state"]
    assert (states[-1]["state"], states[-1]["reason"]) == ("ended", "failed")
