from pathlib import Path

import pytest
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.images import ImageSource
from maskcast.pipeline.sources.open import create_source


def save(path: Path, colour: tuple[int, int, int] = (9, 9, 9), size=(40, 30), **options) -> Path:
    Image.new("RGB", size, colour).save(path, **options)
    return path


def open_images(path: Path, **options) -> ImageSource:
    source = ImageSource(SourceConfig(url=str(path), **options))
    source.open()
    return source


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, level in [("b.png", 2), ("a.png", 1), ("c.PNG", 3)]:
        save(tmp_path / name, (level, level, level))
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images(tmp_path)
    frames = list(source)
    assert [int(frame.decoded.to_ndarray()[0, 0, 0]) for frame in frames] == [1, 2, 3]
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert [frame.pts_s for frame in frames] == [0, 0.04, 0.08]
    assert [frame.file for frame in frames] == ["a.png", "b.png", "c.PNG"]
    assert source.frame_count == 3
    assert source.policy == "block"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode == "CMYK" else ".png"
    Image.new(mode, (40, 30)).save(tmp_path / f"a{suffix}")
    (frame,) = open_images(tmp_path / f"a{suffix}")
    assert frame.decoded.format.name == "rgb24"


def test_an_image_is_rotated_as_its_exif_orientation_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 30))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    (frame,) = open_images(tmp_path / "a.png")
    rgb = frame.decoded.to_ndarray()
    assert rgb.shape == (40, 30, 3)
    assert rgb[5, 15, 0] == 255  # what was left is up
    assert rgb[35, 15, 0] == 0
    assert frame.rotation == 0


def test_a_damaged_image_among_others_is_skipped_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    whole = save(tmp_path / "b.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"")
    save(tmp_path / "d.png")
    source = open_images(tmp_path)
    assert [frame.index for frame in source] == [0, 1]
    assert source.corrupt == 2


def test_a_loop_starts_again(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    source = open_images(tmp_path, loop=True)
    frames = iter(source)
    assert [next(frames).index for _ in range(5)] == [0, 1, 2, 3, 4]
    source.stop()
    assert list(frames) == []


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="contains no images or videos"):
        create_source(SourceConfig(url=str(tmp_path))).open()


def test_an_unreadable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"this is no image")
    with pytest.raises(InputError, match=r"a\.jpg: not an image"):
        create_source(SourceConfig(url=str(tmp_path / "a.jpg"))).open()


def test_a_folder_with_only_damaged_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"this is no image")
    with pytest.raises(InputError, match="none of its 1 images"):
        create_source(SourceConfig(url=str(tmp_path))).open()
