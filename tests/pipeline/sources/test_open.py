import threading
from pathlib import Path

import pytest
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.images import ImageSource
from maskcast.pipeline.sources.live import LiveSource
from maskcast.pipeline.sources.open import check_source, create_source
from maskcast.pipeline.sources.pattern import PatternSource
from maskcast.pipeline.sources.source import Source
from maskcast.pipeline.sources.video import VideoSource


def test_the_url_decides_the_kind_of_source(make_clip, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    clip = make_clip()
    kinds: dict[str, type[Source]] = {
        str(clip): VideoSource,
        f"file://{clip}": VideoSource,
        str(tmp_path): ImageSource,
        str(tmp_path / "a.png"): ImageSource,
        "test://64x48@10": PatternSource,
        "rtsp://camera/stream": LiveSource,
        "rtmp://server/live/cam": LiveSource,
        "udp://0.0.0.0:5000": LiveSource,
        "screen://:0": LiveSource,
        "http://camera/stream": LiveSource,
        "/dev/video99": LiveSource,
    }
    assert {url: type(create_source(SourceConfig(url=url))) for url in kinds} == kinds


def test_creating_a_source_opens_nothing(tmp_path: Path) -> None:
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "empty.mp4").touch()
    urls = ("rtsp://10.255.255.1/x", "http://10.255.255.1/x", "/dev/video99", str(tmp_path))
    for url in (*urls, str(tmp_path / "empty.mp4")):
        create_source(SourceConfig(url=url)).close()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("gopher://admin:secret@host/x", "unknown scheme 'gopher'"),
        ("ftp://host/clip", "unknown scheme 'ftp'"),
        ("gone.mp4", "gone.mp4: no such file or folder; check the path"),
        ("0", "for a camera give /dev/video0"),
        ("screen:0", "for the screen give screen://"),
        ("screenshots", "screenshots: no such file or folder; check the path"),
        ("udp://239.0.0.1", "the port is missing"),
        ("srt://host:9000", "srt is not supported; relay the stream with another program"),
        ("~/clip.mp4", "did not expand '~'"),
        ("clips/*.png", "patterns are not expanded"),
        ("x" * 2000, "no such file"),
        ("a\0b", "no such file"),
        ("rtsp://admin:secret@cam:99999/x", "the port is not a number"),
        ("rtsp:///cam", "the host is missing"),
        ("http://", "the host is missing"),
        ("test://8x8", "not a test pattern"),
    ],
)
def test_what_is_certainly_wrong_is_an_error_at_once(url: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        check_source(SourceConfig(url=url))
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_may_come_later_is_no_error(free_port: int, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    camera = f"rtsp://admin:a/b?c#d@127.0.0.1:{free_port}/cam"
    for url in (camera, "http://nowhere.invalid/x", "/dev/video99", str(tmp_path / "empty.mp4")):
        check_source(SourceConfig(url=url))


def test_a_frame_rate_is_only_for_images(make_clip, tmp_path: Path) -> None:
    check_source(SourceConfig(url=str(tmp_path), fps=5))
    for url in (str(make_clip()), "rtsp://camera/stream", "test://8x8@1"):
        with pytest.raises(InputError, match="'fps' is for folders of images"):
            check_source(SourceConfig(url=url, fps=5))


def test_a_device_decodes_video_only(tmp_path) -> None:
    (tmp_path / "a.png").touch()
    for url in ("test://64x48@5", str(tmp_path), str(tmp_path / "a.png")):
        with pytest.raises(InputError, match="'decode' is for video"):
            check_source(SourceConfig(url=url, decode="cuda"))
