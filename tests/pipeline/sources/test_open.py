from pathlib import Path

import pytest
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.sources.images import ImageSource
from maskcast.pipeline.sources.open import check_address, open_source
from maskcast.pipeline.sources.pattern import PatternSource
from maskcast.pipeline.sources.video import VideoSource


def test_the_address_decides_what_reads_it(make_clip, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    clip = make_clip()
    for url, kind in [
        (str(clip), VideoSource),
        (f"file://{clip}", VideoSource),
        (str(tmp_path), ImageSource),
        (str(tmp_path / "a.png"), ImageSource),
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


def test_an_address_is_checked_without_opening_it(free_port, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for url in (f"rtsp://127.0.0.1:{free_port}/cam", str(tmp_path / "empty.mp4"), "test://8x8@1"):
        check_address(url)
    for url in ("test://8x8", "x" * 5000, "a\0b", "ftp://host/clip"):
        with pytest.raises(InputError):
            check_address(url)
