from pathlib import Path

import pytest

from maskcast.engines.user_cache import user_cache, write_atomically


def test_the_folder_is_the_one_that_the_user_names(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "maskcast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "maskcast"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "graphs"
    path.write_bytes(b"old")
    write_atomically(path, b"ne", b"w")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_neither_a_part_nor_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()  # a file cannot replace it
    with pytest.raises(OSError, match="folder"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
