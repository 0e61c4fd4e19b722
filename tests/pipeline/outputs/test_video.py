from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from recorded import NAMES, frame, instances, published

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.outputs.video import VideoRecorder


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_the_video_keeps_the_timing_of_its_source(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    times_s = [5.0, 5.04, 5.2, 5.2333, 6.5]
    for index, time_s in enumerate(times_s):
        recorder.write(frame(index, pts_s=time_s), instances(), published(index))
    recorder.close()
    found = [frame.time for frame in decoded(tmp_path / "out.mp4")]
    np.testing.assert_allclose(found, np.subtract(times_s, 5.0), atol=1e-3)


def test_the_video_continues_when_the_clock_of_its_source_jumps_back(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index, time_s in enumerate([0.0, 0.1, 0.2, 0.0, 0.1, 0.1]):
        recorder.write(frame(index, pts_s=time_s), instances(), published(index))
    recorder.close()
    found = [frame.time for frame in decoded(tmp_path / "out.mp4")]
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-3)


def test_the_instances_are_drawn_into_the_video(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    found = instances(640, 480)
    found = Instances(640, 480, found.boxes * 10, found.scores, found.labels, found.masks)
    recorder.write(frame(0, size=(640, 480)), found, published(0))
    recorder.close()
    image = decoded(tmp_path / "out.mp4")[0].to_ndarray(format="rgb24").astype(int)
    spread = image.max(axis=2) - image.min(axis=2)  # grey has none
    assert spread[200, 160] > 40
    assert spread[470, 10] < 8


@pytest.mark.parametrize("size", [(65, 47), (853, 479), (1, 1), (2, 3)])
def test_odd_sides_are_extended_by_their_last_pixel(size: tuple[int, int], tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(3):
        recorder.write(frame(index, size=size), Instances.empty(*size), published(index))
    recorder.close()
    frames = decoded(tmp_path / "out.mp4")
    assert len(frames) == 3
    assert (frames[0].width, frames[0].height) == tuple(s + s % 2 for s in size)
    assert frames[0].to_ndarray(format="gray")[-1, -1] > 50


def test_a_frame_of_another_size_is_scaled_into_the_video(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    recorder.write(frame(0, size=(64, 48)), Instances.empty(64, 48), published(0))
    recorder.write(frame(1, size=(96, 48), grey=200), Instances.empty(96, 48), published(1))
    recorder.close()
    frames = decoded(tmp_path / "out.mp4")
    assert [(p.width, p.height) for p in frames] == [(64, 48), (64, 48)]
    second = frames[1].to_ndarray(format="gray")
    assert second[24, 32] == pytest.approx(200, abs=8)
    assert second[1, 32] < 30  # a bar: the shape differs


def test_a_rotated_frame_stands_upright(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255  # the left half is bright
    turned = frame(0, rotation=90)
    turned.decoded = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    recorder.write(turned, Instances.empty(48, 64), published(0))
    recorder.close()
    image = decoded(tmp_path / "out.mp4")[0].to_ndarray(format="gray")
    assert image.shape == (64, 48)
    assert image[50, 24] > 200  # counter-clockwise: left goes to the bottom
    assert image[10, 24] < 50


def test_every_source_has_a_file_of_its_own(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(2):
        for source in ("door", "yard"):
            recorder.write(frame(index, source=source), Instances.empty(64, 48), published(index))
    recorder.close()
    assert [len(decoded(tmp_path / name)) for name in ("out.mp4", "out-yard.mp4")] == [2, 2]


def test_a_finished_video_is_an_ordinary_mp4_with_its_duration(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(120):
        recorder.write(frame(index), Instances.empty(64, 48), published(index))
    recorder.close()
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.frames == 120
        assert stream.codec_context.name == "h264"
        assert Fraction(stream.duration or 0) * (stream.time_base or 0) == pytest.approx(
            4.8, abs=0.05
        )


KILLED = """
import sys
from pathlib import Path
import av, numpy
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.outputs.video import VideoRecorder

recorder = VideoRecorder(Path(sys.argv[1]), ("background", "person"))
grey = av.VideoFrame.from_ndarray(numpy.full((48, 64, 3), 60, numpy.uint8), format="rgb24")
for seq in range(400):
    frame = Frame("cam", seq, seq / 25, seq, grey)
    recorder.write(frame, Instances.empty(64, 48), Published(seq, 0, 0))
print("written", flush=True)
sys.stdin.read()
"""


def test_the_video_of_a_killed_process_plays(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert len(decoded(path)) >= 250


def record(path: Path, count: int, **arguments: Any) -> None:
    recorder = VideoRecorder(path, NAMES, **arguments)
    for index in range(count):
        recorder.write(frame(index), Instances.empty(64, 48), published(index))
    recorder.close()


def test_a_name_that_ends_in_mkv_gives_a_matroska_file(tmp_path: Path) -> None:
    record(tmp_path / "out.mkv", 60)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.format.name.startswith("matroska")
        assert container.duration == pytest.approx(60 / 25 * av.time_base, rel=0.05)
        assert len(list(container.decode(video=0))) == 60


@pytest.mark.parametrize("name", ["out.avi", "out.jpg", "out.webm", "out"])
def test_other_suffixes_are_refused_with_the_list(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a type of video .* use \.mp4 or \.mkv"):
        VideoRecorder(tmp_path / name, NAMES)
    assert list(tmp_path.iterdir()) == []


def test_new_files_begin_by_length_and_hold_every_frame(tmp_path: Path) -> None:
    record(tmp_path / "out.mp4", 65, segment_s=1.0)
    files = list(tmp_path.iterdir())
    assert sorted(len(decoded(path)) for path in files) == [15, 25, 25]
    assert all(decoded(path)[0].pts == 0 for path in files)


def test_new_files_begin_by_size(tmp_path: Path) -> None:
    record(tmp_path / "out.mp4", 160, segment_bytes=1500.0)
    files = list(tmp_path.iterdir())
    assert len(files) > 1
    assert sum(len(decoded(path)) for path in files) == 160


def test_a_video_of_an_earlier_run_stays_until_frames_are_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("old")
    recorder = VideoRecorder(path, NAMES)
    recorder.close()
    assert path.read_text() == "old"
    recorder = VideoRecorder(path, NAMES)
    recorder.write(frame(0), Instances.empty(64, 48), published(0))
    assert path.read_text() == "old"
    recorder.close()
    assert len(decoded(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_images_without_times_are_shown_at_25_per_second(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(4):
        image = replace(frame(index), pts_s=None, capture_ns=index**3 * 10**9)
        recorder.write(image, Instances.empty(64, 48), published(index))
    recorder.close()
    times = [found.time for found in decoded(tmp_path / "out.mp4")]
    np.testing.assert_allclose(times, [0, 0.04, 0.08, 0.12], atol=1e-4)


def test_a_source_that_ends_and_returns_gets_a_second_file(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES, sources=["cam"])
    for _ in range(2):
        recorder.write(frame(0), Instances.empty(64, 48), published(0))
        recorder.end_source("cam")
        recorder.end_source("other")
    recorder.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-2.mp4", "out.mp4"]


def test_a_video_whose_folder_is_gone_is_abandoned_and_a_new_one_started(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    recorder = VideoRecorder(folder / "out.mp4", NAMES)
    index = iter(range(1000))

    def write() -> None:
        number = next(index)
        recorder.write(frame(number), Instances.empty(64, 48), published(number))

    for _ in range(60):
        write()
    shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(OSError, match="No such file"):
            write()
    folder.mkdir()
    for _ in range(3):
        write()
    recorder.close()
    (found,) = folder.iterdir()
    assert found.name == "out.mp4"
    assert len(decoded(found)) == 3


FULL = """
import resource, sys
from pathlib import Path
import av, numpy
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.outputs.video import VideoRecorder

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
recorder = VideoRecorder(Path(sys.argv[1]), ("background", "person"))
random = numpy.random.default_rng(0)
for seq in range(400):
    noise = random.integers(0, 255, (48, 64, 3), numpy.uint8)
    frame = Frame("cam", seq, seq / 25, seq, av.VideoFrame.from_ndarray(noise, format="rgb24"))
    try:
        recorder.write(frame, Instances.empty(64, 48), Published(seq, 0, 0))
    except OSError as error:
        print(seq, error.strerror)
        break
recorder.close()
"""


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_what_was_written_before_the_disk_was_full_plays(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, reason = done.stdout.split(" ", 1)
    assert reason == "File too large\n"
    assert int(count) > 100
    assert list(tmp_path.iterdir()) == [path]
    with av.open(str(path)) as container:
        found = 0
        with suppress(av.FFmpegError):
            for _ in container.decode(video=0):
                found += 1
    assert found >= int(count) - 150
