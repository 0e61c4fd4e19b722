import threading
import time
from pathlib import Path

import pytest

from engines.errors import InputError
from pipeline.config import SourceConfig
from pipeline.pattern import PatternSource
from pipeline.pictures import PictureSource
from pipeline.source import Pace, is_device, is_local, open_source
from pipeline.video import VideoSource


def test_the_address_decides_what_reads_it(make_clip, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    clip = make_clip()
    for url, kind in [
        (str(clip), VideoSource),
        (f"file://{clip}", VideoSource),
        (str(tmp_path), PictureSource),
        (str(tmp_path / "a.png"), PictureSource),
        ("test://64x48@10", PatternSource),
    ]:
        with open_source(SourceConfig(url=url)) as source:
            assert type(source) is kind


def test_an_unknown_scheme_is_refused_without_its_credentials() -> None:
    with pytest.raises(InputError, match="'gopher' is not known") as caught:
        open_source(SourceConfig(url="gopher://admin:secret@host/x"))
    assert "secret" not in str(caught.value)


def test_a_path_with_nothing_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.mp4: there is no such file"):
        open_source(SourceConfig(url=str(tmp_path / "gone.mp4")))


def test_an_absent_camera_is_named() -> None:
    with pytest.raises(InputError, match="/dev/video99: there is no such camera"):
        open_source(SourceConfig(url="/dev/video99"))


def test_a_device_is_neither_a_file_nor_far_away() -> None:
    assert is_device("/dev/video0")
    assert not is_local("/dev/video0")
    assert is_local("clip.mp4")
    assert not is_local("rtsp://cam/x")


def test_files_block_and_cameras_replace_unless_told_otherwise(make_clip) -> None:
    clip = str(make_clip())
    for url, asked, policy in [
        (clip, None, "block"),
        (clip, "latest", "latest"),
        ("test://64x48@10", None, "latest"),
        ("test://64x48@10", "block", "block"),
    ]:
        with open_source(SourceConfig(url=url, policy=asked)) as source:
            assert source.policy == policy


def test_a_pace_follows_the_wall_clock_from_its_first_picture() -> None:
    pace = Pace(threading.Event())
    began_s = time.monotonic()
    pace.wait(100.0)
    pace.wait(100.2)
    pace.wait(100.1)
    assert 0.2 <= time.monotonic() - began_s < 1.0


def test_a_stopped_pace_waits_for_nothing() -> None:
    stopping = threading.Event()
    pace = Pace(stopping)
    pace.wait(0.0)
    threading.Timer(0.05, stopping.set).start()
    began_s = time.monotonic()
    pace.wait(60.0)
    assert time.monotonic() - began_s < 5.0
