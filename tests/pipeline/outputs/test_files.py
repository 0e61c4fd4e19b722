from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.outputs.files import (
    FileNames,
    PendingFile,
    check_not_input,
    check_writable,
)

AT_NS = time.time_ns()
STAMP = f"{datetime.fromtimestamp(AT_NS / 1e9):%Y%m%d-%H%M%S}"


def written(pending: PendingFile, text: str = "new") -> Path:
    pending.path.write_text(text)
    pending.keep()
    return pending.path


def test_files_are_named_after_their_sources_in_any_order(tmp_path: Path) -> None:
    names = FileNames(tmp_path / "out.mp4", ["door", "yard"])
    assert written(names.next("yard", AT_NS)).name == "out-yard.mp4"
    assert written(names.next("door", AT_NS)).name == "out.mp4"
    assert written(names.next("late", AT_NS)).name == "out-late.mp4"


def test_only_the_first_file_of_a_known_source_replaces_one_that_exists(tmp_path: Path) -> None:
    for name in ("out.mp4", "out-late.mp4"):
        (tmp_path / name).write_text("old")
    names = FileNames(tmp_path / "out.mp4", ["door"])
    pending = names.next("door", AT_NS)
    assert pending.path.name == ".out.mp4.part"
    assert (tmp_path / "out.mp4").read_text() == "old"
    assert written(pending).name == "out.mp4"
    assert (tmp_path / "out.mp4").read_text() == "new"
    assert written(names.next("door", AT_NS)).name == "out-2.mp4"
    assert written(names.next("door", AT_NS)).name == "out-3.mp4"
    assert written(names.next("late", AT_NS)).name == "out-late-2.mp4"
    assert (tmp_path / "out-late.mp4").read_text() == "old"


def test_a_name_with_a_time_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / f"cam-{STAMP}.mp4").write_text("old")
    names = FileNames(tmp_path / "cam-%Y%m%d-%H%M%S.mp4", ["door", "yard"])
    assert written(names.next("door", AT_NS)).name == f"cam-{STAMP}-2.mp4"
    assert written(names.next("yard", AT_NS)).name == f"cam-{STAMP}-yard.mp4"
    assert (tmp_path / f"cam-{STAMP}.mp4").read_text() == "old"


def test_segments_without_a_time_get_one(tmp_path: Path) -> None:
    names = FileNames(tmp_path / "out.mp4", ["door"], segmented=True)
    assert written(names.next("door", AT_NS)).name == f"out-{STAMP}.mp4"


def test_folders_with_a_time_in_their_name_are_made(tmp_path: Path) -> None:
    path = tmp_path / "%Y" / "%m" / "cam-%H.mp4"
    check_writable(path)
    found = written(FileNames(path, ["door"]).next("door", AT_NS))
    assert found == Path(datetime.fromtimestamp(AT_NS / 1e9).strftime(str(path)))
    found = written(FileNames(tmp_path / "cam-%D.mp4", ["door"]).next("door", AT_NS))  # 09/30/26
    assert found.parent.parent.parent == tmp_path


def test_a_name_may_contain_the_zone_of_its_local_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "XYZ-5:45")
    time.tzset()
    try:
        found = written(FileNames(tmp_path / "%H%M%z-%Z.mp4", ["door"]).next("door", 0))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found.name == "0545+0545-XYZ.mp4"


def test_a_percent_sign_alone_is_no_pattern(tmp_path: Path) -> None:
    names = FileNames(tmp_path / "100%.mp4", ["door"])
    assert written(names.next("door", AT_NS)).name == "100%.mp4"


def test_a_file_that_is_discarded_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("old")
    pending = FileNames(tmp_path / "out.mp4", ["door"]).next("door", AT_NS)
    pending.path.write_text("broken")
    pending.discard()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.mp4", "old")]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.mp4").write_text("old")
    (tmp_path / "out.mp4").symlink_to(tmp_path / "disk" / "real.mp4")
    written(FileNames(tmp_path / "out.mp4", ["door"]).next("door", AT_NS))
    assert (tmp_path / "out.mp4").is_symlink()
    assert (tmp_path / "disk" / "real.mp4").read_text() == "new"


@pytest.mark.parametrize("how", ["path", "relative", "symlink", "hard link", "in a folder"])
def test_an_output_that_is_an_input_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, output = tmp_path / "clip.mp4", tmp_path / "other.mp4"
    given.write_text("precious")
    inputs = [given]
    match how:
        case "path":
            output = given
        case "relative":
            output = Path("clip.mp4")
        case "symlink":
            output.symlink_to(given)
        case "hard link":
            output.hardlink_to(given)
        case "in a folder":
            output, inputs = given, [tmp_path]
    with pytest.raises(InputError, match="it is the input"):
        check_not_input(output, inputs)


def test_other_outputs_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("precious")
    (tmp_path / "old.mp4").write_text("old")
    inputs = [tmp_path / "clip.mp4", tmp_path / "gone.mp4"]
    check_not_input(tmp_path / "old.mp4", inputs)
    check_not_input(tmp_path / "new.mp4", inputs)


def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder: .*absent; create it first"):
        check_writable(tmp_path / "absent" / "out.mp4")
    with pytest.raises(InputError, match="it is a folder; add a file name"):
        check_writable(tmp_path)
    for name in ("a" * 300, "a" * 248 + ".mp4", f"{'a' * 300}/out.mp4"):  # with ".part" too long
        with pytest.raises(InputError, match="cannot be written: File name too long"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []
