import socket
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.sources import video
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import SourceLostError
from maskcast.pipeline.sources.video import VideoSource


def open_video(url: Path | str, **options) -> VideoSource:
    return VideoSource(SourceConfig(url=str(url), **options))


def level(decoded: av.VideoFrame) -> int:
    """Read the index back out of a numbered frame."""
    return round((float(decoded.reformat(format="gray").to_ndarray().mean()) - 2) / 4)


def test_a_file_yields_every_frame_in_order(make_clip) -> None:
    with open_video(make_clip(frames=20, fps=10)) as source:
        assert (source.width, source.height, source.fps) == (64, 48, 10)
        assert source.frame_count == 20
        assert not source.live
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.pts_s for frame in frames] == pytest.approx([i / 10 for i in range(20)])
    assert source.corrupt == 0


def test_every_frame_is_stamped_when_it_is_decoded(make_clip) -> None:
    before_ns, before_utc_ns = time.monotonic_ns(), time.time_ns()
    with open_video(make_clip()) as source:
        frames = list(source)
    for frame in frames:
        timeline = frame.timeline
        assert before_ns <= timeline.start_ns["decode"] <= timeline.end_ns["decode"]
        assert before_utc_ns <= frame.capture_ns <= time.time_ns()


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "width", "height"),
    [
        ("libx264", "yuv420p", "mkv", 64, 48),
        ("libx264", "yuv420p10le", "mp4", 64, 48),
        ("libx264", "gray", "mp4", 64, 48),
        ("libx264", "yuv444p", "mp4", 65, 47),
        ("libx265", "yuv420p", "mp4", 64, 64),
        ("mpeg4", "yuv420p", "avi", 64, 48),
        ("mjpeg", "yuvj420p", "avi", 64, 48),
        ("ffv1", "bgr0", "mkv", 33, 21),
    ],
)
def test_unusual_pixel_formats_and_codecs_are_read(
    make_clip, codec: str, pix_fmt: str, suffix: str, width: int, height: int
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    clip = make_clip(
        f"a.{suffix}", codec=codec, pix_fmt=pix_fmt, width=width, height=height, frames=5, **options
    )
    with open_video(clip) as source:
        frames = list(source)
    assert len(frames) == 5
    assert {(frame.decoded.width, frame.decoded.height) for frame in frames} == {(width, height)}


@pytest.mark.parametrize(("display", "rotation"), [(90, 90), (-90, 270), (180, 180), (0, 0)])
def test_the_rotation_is_that_of_the_display_matrix(make_clip, display: int, rotation: int) -> None:
    with open_video(make_clip(rotation=display, frames=3)) as source:
        assert [frame.rotation for frame in source] == [rotation] * 3


def test_the_frames_are_those_that_were_encoded(make_clip) -> None:
    with open_video(make_clip(frames=30)) as source:
        assert [level(frame.decoded) for frame in source] == list(range(30))


def test_a_colon_in_a_file_name_is_not_a_protocol(make_clip, tmp_path, monkeypatch) -> None:
    make_clip("a:b.mp4")
    monkeypatch.chdir(tmp_path)
    with open_video("a:b.mp4") as source:
        assert len(list(source)) == 10


def test_times_and_indices_increase_over_a_loop(make_clip) -> None:
    with open_video(make_clip(frames=4, fps=10), loop=True) as source:
        assert source.frame_count is None
        frames = list(islice(source, 10))
    assert [frame.index for frame in frames] == list(range(10))
    assert [frame.pts_s for frame in frames] == pytest.approx([i / 10 for i in range(10)])


def test_the_videos_of_a_folder_follow_one_another_in_the_order_of_their_names(
    make_clip, tmp_path: Path, caplog
) -> None:
    for name, width in (("b.mkv", 96), ("a.mp4", 64), ("d.mp4", 64)):
        make_clip(name, frames=4, fps=10, width=width)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").touch()
    with open_video(tmp_path) as source:
        frames = list(source)
        assert source.corrupt == 1
    assert [frame.file for frame in frames] == 4 * ["a.mp4"] + 4 * ["b.mkv"] + 4 * ["d.mp4"]
    assert [frame.decoded.width for frame in frames] == 4 * [64] + 4 * [96] + 4 * [64]
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.pts_s for frame in frames] == pytest.approx([i / 10 for i in range(12)], abs=2e-3)
    (record,) = caplog.records
    assert record.message == "video_unreadable"
    with open_video(tmp_path, loop=True) as source:
        assert len(list(islice(source, 30))) == 30


def test_a_looped_folder_whose_videos_vanish_is_lost(make_clip, tmp_path: Path) -> None:
    clip = make_clip("a.mp4", frames=4)
    with open_video(tmp_path, loop=True) as source:
        frames = iter(source)
        assert len(list(islice(frames, 4))) == 4
        clip.unlink()
        with pytest.raises(SourceLostError, match="contains no images or videos"):
            next(frames)


def test_a_folder_without_a_readable_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="contains no frames"):
        VideoSource(SourceConfig(url=str(tmp_path))).open()


def test_a_file_played_as_a_camera_keeps_its_own_speed(make_clip) -> None:
    with open_video(make_clip(frames=6, fps=20), policy="latest") as source:
        began_s = time.monotonic()
        frames = list(source)
        assert 0.25 <= time.monotonic() - began_s < 30.0
    ages_ns = [
        frame.timeline.end_ns["decode"] - frame.timeline.start_ns["decode"] for frame in frames
    ]
    assert min(ages_ns[1:]) < 40_000_000  # waiting for its turn is not decoding
    assert frames[-1].capture_ns - frames[0].capture_ns > 200_000_000


def test_the_frame_size_may_change(make_clip, tmp_path: Path) -> None:
    # An H.264 elementary stream may be cut together: each part brings its own parameter sets.
    parts = [make_clip("a.h264", frames=5), make_clip("b.h264", frames=5, width=96, height=80)]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_video(tmp_path / "both.h264") as source:
        sizes = [(frame.decoded.width, frame.decoded.height) for frame in source]
    assert sizes == [(64, 48)] * 5 + [(96, 80)] * 5


def noise(index: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)


def test_damage_is_skipped_and_counted(make_clip) -> None:
    clip = make_clip("a.mp4", frames=40, draw=noise, codec="mjpeg", pix_fmt="yuvj420p")
    whole = bytearray(clip.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 6000] = bytes(6000)
    clip.write_bytes(whole)
    with open_video(clip) as source:
        frames = list(source)
    assert source.corrupt > 0
    assert 20 < len(frames) < 40
    assert frames[-1].pts_s == pytest.approx(3.9)


def test_a_truncated_file_yields_its_frames(make_clip) -> None:
    clip = make_clip("a.mkv", frames=40, draw=noise)
    whole = clip.read_bytes()
    clip.write_bytes(whole[: len(whole) * 2 // 3])
    with open_video(clip) as source:
        assert 10 < len(list(source)) < 40


def test_a_file_that_is_not_a_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("this is no video" * 100)
    with pytest.raises(InputError, match=r"notes\.mp4: not a video"):
        create_source(SourceConfig(url=str(path))).open()


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.mp4: not a video"):
        create_source(SourceConfig(url=str(tmp_path / "empty.mp4"))).open()


def test_a_video_without_frames_is_refused(make_clip) -> None:
    with pytest.raises(InputError, match=r"a\.avi: the video contains no frames"):
        create_source(SourceConfig(url=str(make_clip("a.avi", frames=0)))).open()


def test_a_sound_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match="contains only audio"):
        create_source(SourceConfig(url=str(path))).open()


def test_a_file_without_permission_is_refused(make_clip) -> None:
    clip = make_clip()
    clip.chmod(0)
    if _can_read(clip):
        pytest.skip("this user may read everything")
    with pytest.raises(InputError, match="permission denied"):
        create_source(SourceConfig(url=str(clip))).open()


def _can_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_refused_connection_is_named_without_its_credentials(free_port: int, scheme: str) -> None:
    with pytest.raises(InputError, match="connection refused") as caught:
        open_video(f"{scheme}://admin:secret@127.0.0.1:{free_port}/cam").open()
    assert "secret" not in str(caught.value)
    assert f"127.0.0.1:{free_port}" in str(caught.value)


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_server_that_never_answers_times_out(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/cam"
        began_s = time.monotonic()
        with pytest.raises(InputError, match=r"no answer within 0\.5 s"):
            open_video(url, open_timeout_s=0.5).open()
        assert time.monotonic() - began_s < 30.0


def test_a_file_is_read_over_http(make_clip, http_server: str) -> None:
    make_clip("a.mp4", frames=12)
    with open_video(f"{http_server}/a.mp4") as source:
        assert not source.live
        assert len(list(source)) == 12


def test_a_file_that_http_does_not_have_is_named(http_server: str) -> None:
    with pytest.raises(InputError, match="the server has nothing at this path"):
        open_video(f"{http_server}/gone.mp4").open()


def test_a_stream_that_falls_silent_is_lost(stalling_server) -> None:
    frames = 0
    with open_video(stalling_server.url, read_timeout_s=0.5) as source:
        began_s = time.monotonic()
        with pytest.raises(SourceLostError, match=r"no data for 0\.5 s"):  # noqa: PT012
            for _ in source:
                frames += 1
        assert time.monotonic() - began_s < 30.0
    assert frames > 10


def test_an_rtsp_camera_is_read(rtsp_server) -> None:
    rtsp_server.start("--width", "320", "--height", "240", "--fps", "30")
    with open_video(rtsp_server.url) as source:
        assert source.live
        assert source.policy == "latest"
        assert (source.width, source.height) == (320, 240)
        frames = list(islice(source, 30))
    assert [frame.index for frame in frames] == list(range(30))
    times_s = [frame.pts_s for frame in frames if frame.pts_s is not None]
    assert len(times_s) >= 28  # the first packets may come before the camera's clock is known
    assert times_s == sorted(times_s)
    assert times_s[-1] - times_s[0] == pytest.approx((len(times_s) - 1) / 30, abs=1.0)


def test_an_rtsp_camera_that_ends_ends_the_source(rtsp_server) -> None:
    rtsp_server.start("--frames", "45")
    with open_video(rtsp_server.url, read_timeout_s=2.0) as source:
        assert 0 < len(list(source)) <= 45


def test_an_rtsp_camera_that_dies_is_lost_or_ended(rtsp_server) -> None:
    rtsp_server.start()
    with open_video(rtsp_server.url, read_timeout_s=1.0) as source:
        frames = iter(source)
        next(frames)
        rtsp_server.stop()
        began_s = time.monotonic()
        try:
            for _ in frames:
                pass
        except SourceLostError as lost:
            assert "127.0.0.1" in str(lost)  # noqa: PT017
        assert time.monotonic() - began_s < 30.0


def test_an_rtsp_camera_with_a_password_requires_it(rtsp_server) -> None:
    rtsp_server.start("--credentials", "admin:secret")
    with pytest.raises(InputError, match="access denied") as caught:
        open_video(rtsp_server.url.replace("//", "//admin:wrong@")).open()
    assert "wrong" not in str(caught.value)
    with open_video(rtsp_server.url.replace("//", "//admin:secret@")) as source:
        assert next(iter(source)).index == 0


def test_an_rtsp_path_that_is_not_there_is_named(rtsp_server) -> None:
    rtsp_server.start()
    with pytest.raises(InputError, match="nothing at this path"):
        open_video(rtsp_server.url.replace("/cam", "/yard")).open()


def test_a_stopped_source_ends_before_the_next_frame(make_clip) -> None:
    with open_video(make_clip(frames=30)) as source:
        frames = iter(source)
        next(frames)
        source.stop()
        assert list(frames) == []


def test_a_frame_that_was_yielded_is_not_kept(make_clip, monkeypatch) -> None:
    """This includes the first one, which the source decodes to find its size."""

    class Noticed(Frame):
        def __del__(self) -> None:
            gone.append(self.index)

    gone: list[int] = []
    monkeypatch.setattr(video, "Frame", Noticed)
    with open_video(make_clip(frames=5)) as source:
        frames = iter(source)
        for _ in range(3):
            next(frames)
        assert gone == [0, 1]


def test_a_closed_source_may_be_closed_again(make_clip) -> None:
    source = open_video(make_clip())
    source.close()
    source.open()
    source.close()
    source.close()


def test_iterating_over_a_closed_video_ends(make_clip) -> None:
    for looped in (False, True):
        with VideoSource(SourceConfig(url=str(make_clip(frames=60)), loop=looped)) as source:
            frames = iter(source)
            assert [next(frames).index for _ in range(3)] == [0, 1, 2]
        assert list(frames) == []  # PyAV alone would crash here
        source.close()
