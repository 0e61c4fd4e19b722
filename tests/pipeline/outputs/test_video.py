from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from recorded import NAMES, frame, instances, published

from maskcast.engines.instances import Instances
from maskcast.pipeline.outputs.video import VideoRecorder


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_the_video_keeps_the_source_s_timing(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    times_s = [5.0, 5.04, 5.2, 5.2333, 6.5]
    for index, time_s in enumerate(times_s):
        recorder.write(frame(index, pts_s=time_s), instances(), published(index))
    recorder.close()
    found = [picture.time for picture in decoded(tmp_path / "out.mp4")]
    np.testing.assert_allclose(found, np.subtract(times_s, 5.0), atol=1e-3)


def test_the_video_goes_on_when_the_source_s_clock_jumps_back(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index, time_s in enumerate([0.0, 0.1, 0.2, 0.0, 0.1, 0.1]):
        recorder.write(frame(index, pts_s=time_s), instances(), published(index))
    recorder.close()
    found = [picture.time for picture in decoded(tmp_path / "out.mp4")]
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-3)


def test_the_instances_are_drawn_into_the_video(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    found = instances(640, 480)
    found = Instances(640, 480, found.boxes * 10, found.scores, found.labels, found.masks)
    recorder.write(frame(0, size=(640, 480)), found, published(0))
    recorder.close()
    picture = decoded(tmp_path / "out.mp4")[0].to_ndarray(format="rgb24").astype(int)
    spread = picture.max(axis=2) - picture.min(axis=2)  # grey has none
    assert spread[200, 160] > 40
    assert spread[470, 10] < 8


@pytest.mark.parametrize("size", [(65, 47), (1, 1), (2, 3)])
def test_odd_sizes_become_even(size: tuple[int, int], tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(3):
        recorder.write(frame(index, size=size), Instances.empty(*size), published(index))
    recorder.close()
    pictures = decoded(tmp_path / "out.mp4")
    assert len(pictures) == 3
    assert (pictures[0].width, pictures[0].height) == tuple(s + s % 2 for s in size)


def test_a_picture_of_another_size_is_scaled_into_the_video(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    recorder.write(frame(0, size=(64, 48)), Instances.empty(64, 48), published(0))
    recorder.write(frame(1, size=(96, 48), grey=200), Instances.empty(96, 48), published(1))
    recorder.close()
    pictures = decoded(tmp_path / "out.mp4")
    assert [(p.width, p.height) for p in pictures] == [(64, 48), (64, 48)]
    second = pictures[1].to_ndarray(format="gray")
    assert second[24, 32] == pytest.approx(200, abs=8)
    assert second[1, 32] < 30  # a bar: the shape differs


def test_a_rotated_picture_stands_upright(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255  # the left half is bright
    turned = frame(0, rotation=90)
    turned.picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    recorder.write(turned, Instances.empty(48, 64), published(0))
    recorder.close()
    picture = decoded(tmp_path / "out.mp4")[0].to_ndarray(format="gray")
    assert picture.shape == (64, 48)
    assert picture[50, 24] > 200  # counter-clockwise: left goes to the bottom
    assert picture[10, 24] < 50


def test_every_source_has_a_file_of_its_own(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", NAMES)
    for index in range(2):
        for source in ("door", "yard"):
            recorder.write(frame(index, source=source), Instances.empty(64, 48), published(index))
    recorder.close()
    assert recorder.paths == [tmp_path / "out.mp4", tmp_path / "out-yard.mp4"]
    assert [len(decoded(path)) for path in recorder.paths] == [2, 2]


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
from maskcast.engines.instances import Instances
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
