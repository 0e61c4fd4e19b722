from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from publishers import NAMES, frame, seen
from recordings import Background, made

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients import clips
from maskcast.pipeline.clients.clip_video import render
from maskcast.pipeline.clients.clips import ClipRecording
from maskcast.pipeline.clients.recording import record
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import StreamEvent
from maskcast.pipeline.wire.message import EventHeader, EventMessage, decode_header, encode
from maskcast.pipeline.wire.recording import RawMessage

S = 1_000_000_000
BEGIN_NS = 1_700_000_000 * S


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 120, 40)).save(file, "JPEG")
    return file.getvalue()


class Stream:
    """Adds messages of a source to a recording at given times."""

    def __init__(self, recording: ClipRecording, source: str = "cam1") -> None:
        self._recording = recording
        self._source = source
        self._seq = 0
        self._frames = made([(source, "instances", 0, b"")] * 400)

    def frame(self, at_s: float) -> None:
        self._add(self._frames[self._seq], at_s)
        self._seq += 1

    def event(self, name: str, at_s: float) -> None:
        header = EventHeader(
            publisher="ab" * 8, seq=int(at_s * 10), publish_ns=1, event=name, sent=self._seq
        )
        self._add(encode(EventMessage(self._source, header)), at_s)

    def _add(self, parts: list[bytes], at_s: float) -> None:
        message = RawMessage(parts, BEGIN_NS + int(at_s * S))
        self._recording.add(message, *decode_header(parts))


def items(path: Path) -> list[int | str]:
    received = subscribe(f"file:{path}", events=True)
    return [item.name if isinstance(item, StreamEvent) else item.index for item in received]


def clip_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mcap"))


def test_a_clip_holds_what_surrounds_its_events(tmp_path: Path) -> None:
    recording = ClipRecording(tmp_path / "c.mcap", ["zone_entered"], before_s=2, after_s=3)
    stream, other = Stream(recording), Stream(recording, "door")
    stream.event("state", 0)
    for at_s in range(30):
        other.frame(at_s)
        stream.frame(at_s)
        if at_s in (10, 12, 24):
            stream.event("zone_entered", at_s + 0.5)
        if at_s == 16:
            stream.event("line_crossed", at_s + 0.5)  # not one of the clip's events
    recording.close()
    first, second = clip_files(tmp_path)
    assert first.name.endswith("-cam1.mcap")
    assert items(first) == ["state", 9, 10, "zone_entered", 11, 12, "zone_entered", 13, 14, 15]
    assert items(second) == ["state", 23, 24, "zone_entered", 25, 26, 27]


def test_the_ring_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "RING_BYTES", 1000)
    recording = ClipRecording(tmp_path / "c.mcap", ["zone_left"], before_s=60, after_s=1)
    stream = Stream(recording)
    for at_s in range(30):
        stream.frame(at_s)
    stream.event("zone_left", 30)
    recording.close()
    (clip,) = clip_files(tmp_path)
    found = items(clip)
    assert 2 <= len(found) < 10
    assert found[-2:] == [29, "zone_left"]


def test_events_without_end_do_not_make_a_clip_without_end(tmp_path: Path) -> None:
    recording = ClipRecording(tmp_path / "c.mcap", ["line_crossed"], before_s=1, after_s=10)
    stream = Stream(recording)
    for at_s in range(0, 1300, 5):
        stream.event("line_crossed", at_s)
    recording.close()
    assert len(clip_files(tmp_path)) == 3


def test_old_clips_are_deleted(tmp_path: Path) -> None:
    limit = 6000
    recording = ClipRecording(
        tmp_path / "c.mcap", ["zone_left"], before_s=1, after_s=1, disk_bytes=limit
    )
    stream = Stream(recording)
    for at_s in range(0, 100, 5):
        stream.frame(at_s)
        stream.event("zone_left", at_s)
    recording.close()
    left = clip_files(tmp_path)
    assert 0 < len(left) < 20
    assert sum(file.stat().st_size for file in left) <= limit
    assert items(left[-1])[-1] == "zone_left"


def test_the_video_of_a_clip_shows_its_masks(tmp_path: Path) -> None:
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        endpoint = publisher.endpoint
        with Background(
            lambda: record(
                endpoint, tmp_path / "c.mcap", on=["zone_entered"], after_s=60, video=True
            )
        ):
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            for index in range(6):
                publisher.publish(frame(index=index), seen(1), jpeg=jpeg((32, 24)))
                if index == 3:
                    publisher.event("cam1", "zone_entered", zone="door")
            publisher.event("cam1", "ended")
    (clip,) = clip_files(tmp_path)
    with av.open(str(clip.with_suffix(".mp4"))) as video:
        images = [image.to_ndarray(format="rgb24") for image in video.decode(video=0)]
    assert len(images) == 6
    assert images[0].shape == (48, 64, 3)
    outside, inside = images[-1][44, 60].astype(int), images[-1][30, 20].astype(int)
    assert np.abs(outside - (10, 120, 40)).max() < 25
    assert np.abs(inside - outside).max() > 50


def test_a_clip_without_images_has_no_video(tmp_path: Path) -> None:
    recording = ClipRecording(tmp_path / "c.mcap", ["zone_left"], before_s=1, after_s=1)
    stream = Stream(recording)
    stream.frame(0)
    stream.event("zone_left", 0)
    recording.close()
    (clip,) = clip_files(tmp_path)
    assert render(clip, tmp_path / "v.mp4") == 0
    assert not (tmp_path / "v.mp4").exists()


def test_options_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.mcap"
    with pytest.raises(InputError, match="event 'zone_enterd': unknown"):
        record("tcp://127.0.0.1:9", path, on=["zone_enterd"])
    with pytest.raises(InputError, match="video: only clips have one"):
        record("tcp://127.0.0.1:9", path, video=True)
    with pytest.raises(InputError, match="segments: clips are not split"):
        record("tcp://127.0.0.1:9", path, on=["zone_left"], segment_s=60)


def test_a_recorder_and_a_reader_load_no_decoder() -> None:
    code = """
import sys
import maskcast
from maskcast.pipeline.clients import recording, clips
from maskcast.pipeline.publisher import publisher
maskcast.record, maskcast.replay, maskcast.subscribe
heavy = ("av", "openvino", "PIL", "maskcast.pipeline.frame")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
