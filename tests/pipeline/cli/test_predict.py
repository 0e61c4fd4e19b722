from pathlib import Path

import numpy as np
import pytest
from parity import PORTRAIT
from PIL import Image

from maskcast.engines.errors import InputError
from maskcast.engines.load import load_engine
from maskcast.pipeline.cli.predict import find_images, predict_files


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.png", "notes.txt"):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / name, format="PNG")
    return folder


def test_folders_patterns_and_files_are_found_once_each(images: Path) -> None:
    found = find_images([str(images), str(images / "*.png"), str(images / "a.jpg")])
    assert found == [images / "a.jpg", images / "b.png"]


@pytest.mark.parametrize("name", ["none.jpg", "*.gif"])
def test_a_name_or_pattern_without_images_is_named(images: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such image"):
        find_images([str(images / name)])


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in this folder"):
        find_images([str(tmp_path)])


def test_each_image_is_written_with_its_instances(tmp_path: Path) -> None:
    engine = load_engine("default")
    out = tmp_path / "out"
    (record,) = predict_files(engine, [PORTRAIT], out, None)
    engine.close()
    assert record.file == str(PORTRAIT)
    assert [found["category"] for found in record.instances] == ["person"]
    with Image.open(PORTRAIT) as before, Image.open(out / PORTRAIT.name) as after:
        assert after.size == before.size
        assert np.asarray(after.convert("RGB")).std() > 0
        assert not np.array_equal(np.asarray(after), np.asarray(before))


def test_an_output_that_is_no_folder_is_refused(images: Path, tmp_path: Path) -> None:
    engine = load_engine("default")
    for out in (images / "a.jpg", tmp_path / "new.png"):
        with pytest.raises(InputError, match=rf"{out}: not a folder; give a folder"):
            list(predict_files(engine, [images / "a.jpg"], out, None))
    engine.close()
    assert not (tmp_path / "new.png").exists()


def test_images_of_one_name_are_both_written(images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jpg").write_bytes((images / "a.jpg").read_bytes())
    engine = load_engine("default")
    out = tmp_path / "out"
    list(predict_files(engine, [images / "a.jpg", other / "a.jpg"], out, None))
    engine.close()
    assert sorted(path.name for path in out.iterdir()) == ["a-2.jpg", "a.jpg"]


def test_an_input_is_never_overwritten(images: Path) -> None:
    engine = load_engine("default")
    before = (images / "a.jpg").read_bytes()
    with pytest.raises(InputError, match="is an input"):
        list(predict_files(engine, [images / "a.jpg"], images, None))
    engine.close()
    assert (images / "a.jpg").read_bytes() == before
