from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from recorded import NAMES, frame, instances, published

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.outputs.jsonl import JsonlRecorder, instance_records
from maskcast.pipeline.outputs.video import VideoRecorder


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
