from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import JsonlRecorder, VideoRecorder, instance_records
from maskcast.pipeline.stages.publish import Published

NAMES = ("background", "person", "dog")


def frame(
    index: int,
    *,
    size: tuple[int, int] = (64, 48),
    pts_s: float | None = None,
    grey: int = 60,
    rotation: int = 0,
    source: str = "cam",
) -> Frame:
    pixels = np.full((size[1], size[0], 3), grey, np.uint8)
    return Frame(
        source=source,
        index=index,
        pts_s=index / 25 if pts_s is None else pts_s,
        capture_ns=1_700_000_000_000_000_000 + index * 40_000_000,
        picture=av.VideoFrame.from_ndarray(pixels, format="rgb24"),
        rotation=rotation,
    )


def instances(width: int = 64, height: int = 48) -> Instances:
    crops = np.zeros((2, 28, 28), np.uint8)
    crops[0, 4:24, 4:24] = 255
    crops[1, :, :14] = 200
    return Instances(
        width=width,
        height=height,
        boxes=np.array([[2.123456, 3, 30, 40], [20, 10, 60, 44]], np.float32),
        scores=np.array([0.987654, 0.5], np.float32),
        labels=np.array([1, 2], np.int32),
        masks=crops,
    )


def published(seq: int) -> Published:
    return Published(seq=seq, publish_ns=0, lost_before=0)


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_an_instance_record_names_the_label_and_holds_the_mask_as_coco_rle() -> None:
    found = instances()
    first, second = instance_records(found, NAMES)
    assert (first.label, second.label) == ("person", "dog")
    assert first.score == 0.9877
    assert first.box == [2.12, 3.0, 30.0, 40.0]
    assert first.segmentation is not None
    rle = {"size": list(first.segmentation.size), "counts": first.segmentation.counts}
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), found.mask(0))


def test_without_a_mask_branch_the_segmentation_is_null() -> None:
    found = instances()
    found = Instances(64, 48, found.boxes, found.scores, found.labels, None)
    assert [record.segmentation for record in instance_records(found, NAMES)] == [None, None]


def test_a_line_of_jsonl_has_the_documented_keys(tmp_path: Path) -> None:
    recorder = JsonlRecorder(tmp_path / "out.jsonl", NAMES)
    recorder.write(frame(0), instances(), published(0))
    recorder.write(frame(1), Instances.empty(64, 48), published(1))
    recorder.close()
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert list(first) == [
        "source", "seq", "pts_s", "capture_ns", "age_ms", "lost_before", "width", "height",
        "instances",
    ]  # fmt: skip
    assert (first["source"], first["seq"], first["width"], first["height"]) == ("cam", 0, 64, 48)
    assert list(first["instances"][0]) == ["label", "score", "box", "segmentation"]
    assert first["instances"][0]["segmentation"]["size"] == [48, 64]
    assert (second["pts_s"], second["instances"]) == (0.04, [])


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    recorder = JsonlRecorder(tmp_path / "out.jsonl", NAMES)
    for seq in range(3):
        recorder.write(frame(seq), instances(), published(seq))
        lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == seq + 1
        assert lines[-1].endswith(b"\n")
    recorder.close()


@pytest.mark.parametrize("recorder", [JsonlRecorder, VideoRecorder])
def test_a_file_that_cannot_be_written_is_named_at_once(
    recorder: type[JsonlRecorder | VideoRecorder], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"absent/out: cannot be written: No such file"):
        recorder(tmp_path / "absent" / "out", NAMES)


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
from maskcast.pipeline.stages.publish import Published
from maskcast.pipeline.outputs.recorder import VideoRecorder

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
