from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from recorded import NAMES, frame, instances, published

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.outputs.jsonl import JsonlRecorder, instance_records
from maskcast.pipeline.outputs.video import VideoRecorder
from maskcast.pipeline.tracking.analysis import Analysis


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


def test_keypoints_are_named_and_rounded_and_absent_without_a_pose() -> None:
    points = Keypoints(("head", "foot"))
    found = replace(
        instances(),
        keypoints=np.array([[[2.123456, 3, 0.98762], [4, 5, 0]], [[1, 2, 1]] * 2], np.float32),
    )
    first, second = instance_records(found, NAMES, points)
    assert first.keypoints == {"head": [2.12, 3.0, 0.9876], "foot": [4.0, 5.0, 0.0]}
    assert second.keypoints == {"head": [1.0, 2.0, 1.0], "foot": [1.0, 2.0, 1.0]}
    assert "keypoints" not in msgspec.to_builtins(instance_records(instances(), NAMES, points)[0])


def test_a_line_of_jsonl_has_the_documented_keys(tmp_path: Path) -> None:
    recorder = JsonlRecorder(tmp_path / "out.jsonl", NAMES)
    recorder.write(frame(0), instances(), published(0))
    recorder.write(frame(1), Instances.empty(64, 48), published(1))
    recorder.close()
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert list(first) == [
        "source", "seq", "pts_s", "capture_ns", "age_ms", "dropped_before", "lost_before",
        "width", "height", "instances",
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
    with pytest.raises(InputError, match=r"absent/out\.mp4: cannot be written: no such folder"):
        recorder(tmp_path / "absent" / "out.mp4", NAMES)


@pytest.mark.parametrize("recorder", [JsonlRecorder, VideoRecorder])
def test_arguments_of_a_wrong_type_are_named(
    recorder: type[JsonlRecorder | VideoRecorder], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        recorder(3, NAMES)  # type: ignore[arg-type]
    for wrong in ("person", [1, 2]):
        with pytest.raises(TypeError, match="label_names: expected a sequence of class names"):
            recorder(str(tmp_path / "out.mp4"), wrong)  # type: ignore[arg-type]


def write(recorder: JsonlRecorder, *seqs: int) -> None:
    for seq in seqs:
        recorder.write(frame(seq), instances(), published(seq))


def seqs(path: Path) -> list[int]:
    return [json.loads(line)["seq"] for line in path.read_bytes().splitlines()]


def test_a_file_of_an_earlier_run_is_replaced_by_the_first_line_and_not_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    recorder = JsonlRecorder(path, NAMES)
    assert path.read_text() == "old\n"
    recorder.close()
    assert path.read_text() == "old\n"
    recorder = JsonlRecorder(path, NAMES)
    write(recorder, 0)
    assert seqs(path) == [0]
    recorder.close()
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_appended_also_after_an_incomplete_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for seq in (0, 1):
        recorder = JsonlRecorder(path, NAMES, append=True)
        write(recorder, seq)
        recorder.close()
    assert seqs(path) == [0, 1]
    with path.open("ab") as file:
        file.write(b'{"killed')
    recorder = JsonlRecorder(path, NAMES, append=True)
    write(recorder, 2)
    recorder.close()
    lines = path.read_bytes().splitlines()
    assert lines[2] == b'{"killed'
    assert json.loads(lines[3])["seq"] == 2


def test_new_files_begin_by_time_and_by_size(tmp_path: Path) -> None:
    by_time = JsonlRecorder(tmp_path / "t.jsonl", NAMES, segment_s=0.1)  # frames are 40 ms apart
    write(by_time, *range(7))
    by_time.close()
    assert [seqs(path) for path in sorted(tmp_path.glob("t-*"), key=lambda p: seqs(p))] == [
        [0, 1, 2], [3, 4, 5], [6],
    ]  # fmt: skip
    by_size = JsonlRecorder(tmp_path / "s.jsonl", NAMES, segment_bytes=1.0)
    write(by_size, *range(3))
    by_size.close()
    assert sorted(map(seqs, tmp_path.glob("s-*"))) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="append: not together"):
        JsonlRecorder(tmp_path / "a.jsonl", NAMES, append=True, segment_s=1.0)


def test_a_file_that_was_deleted_is_reported_and_started_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    recorder = JsonlRecorder(path, NAMES)
    write(recorder, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        write(recorder, 1)
    write(recorder, 2)
    recorder.close()
    assert seqs(path) == [2]


def test_lines_are_appended_after_repeated_failures(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out.jsonl"
    recorder = JsonlRecorder(path, NAMES)
    write(recorder, 0)
    with monkeypatch.context() as full:
        full.setattr(JsonlRecorder, "_write_line", fail)
        for seq in (1, 2):
            with pytest.raises(OSError, match="No space left"):
                write(recorder, seq)
    write(recorder, 3)
    recorder.close()
    assert seqs(path) == [0, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_lines_can_go_to_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    recorder = JsonlRecorder(path, NAMES)
    with pytest.raises(OSError, match="No such device"):  # nobody reads: it does not block
        write(recorder, 0)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write(recorder, 1)
    recorder.close()
    assert json.loads(os.read(reader, 65536))["seq"] == 1
    os.close(reader)
    assert path.is_fifo()


def test_a_dash_is_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    recorder = JsonlRecorder("-", NAMES)
    write(recorder, 0)
    recorder.close()
    assert json.loads(capfd.readouterr().out)["seq"] == 0


def test_track_ids_zones_and_lines_are_written_where_there_are_any(tmp_path: Path) -> None:
    tracked = replace(instances(), track_ids=np.array([7, 0], np.int32))
    analysis = Analysis({"door": 1}, {"gate": {"forward": 3, "backward": 1}})
    recorder = JsonlRecorder(tmp_path / "out.jsonl", NAMES)
    recorder.write(frame(0), tracked, replace(published(0), analysis=analysis))
    recorder.close()
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert [found["track_id"] for found in line["instances"]] == [7, None]
    assert line["zones"] == {"door": 1}
    assert line["lines"] == {"gate": {"forward": 3, "backward": 1}}


def test_a_line_of_an_image_names_its_file(tmp_path: Path) -> None:
    recorder = JsonlRecorder(tmp_path / "out.jsonl", NAMES)
    recorder.write(replace(frame(0), file="a.jpg"), instances(), published(0))
    recorder.close()
    assert json.loads((tmp_path / "out.jsonl").read_bytes())["file"] == "a.jpg"
