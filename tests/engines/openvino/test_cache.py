from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maskcast.engines.openvino import cache as cache_module
from maskcast.engines.openvino.cache import (
    DamagedEntryError,
    Entry,
    GraphCache,
    cache_folder,
    describe,
)

SIZE = (96, 160)


def entry(fill: int, size_bytes: int = 1000) -> Entry:
    return Entry.make(
        {"detector": [("f32", memoryview(bytes([fill]) * size_bytes))]},
        {"boxes": np.full((1, 3, 4), fill, np.float32)},
    )


def test_an_entry_is_read_as_it_was_stored(tmp_path: Path) -> None:
    cache = GraphCache("model", tmp_path)
    assert cache.load(SIZE) is None
    assert not cache.has_entries()
    assert cache.store(SIZE, entry(7))
    found = cache.load(SIZE)
    assert found is not None
    assert found.graphs == {"detector": [("f32", b"\7" * 1000)]}
    np.testing.assert_array_equal(found.outputs["boxes"], np.full((1, 3, 4), 7, np.float32))
    assert cache.has_entries()
    assert cache.load((160, 96)) is None
    assert not GraphCache("other", tmp_path).has_entries()


def test_an_entry_can_be_read_after_its_pages_were_released(tmp_path: Path) -> None:
    cache = GraphCache("model", tmp_path)
    cache.store(SIZE, entry(7, 100_000))
    found = cache.load(SIZE)
    assert found is not None
    found.release_pages()
    assert found.graphs == {"detector": [("f32", b"\7" * 100_000)]}


def test_an_empty_file_is_damaged(tmp_path: Path) -> None:
    cache = GraphCache("model", tmp_path)
    cache.store(SIZE, entry(7))
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"")
    with pytest.raises(DamagedEntryError):
        cache.load(SIZE)


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_changed_byte_is_noticed(tmp_path: Path, at: int) -> None:
    cache = GraphCache("model", tmp_path)
    cache.store(SIZE, entry(7))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedEntryError):
        cache.load(SIZE)


def test_the_least_recently_used_entries_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LIMIT_BYTES", 4500)
    cache = GraphCache("model", tmp_path)
    sizes = [(32 * number, 64) for number in range(1, 5)]
    for age, size in enumerate(sizes[:3]):
        cache.store(size, entry(1))
        os.utime(tmp_path / f"model-{size[0]}x64.graphs", (1000 + age, 1000 + age))
    assert cache.load(sizes[0]) is not None  # now the most recently used
    cache.store(sizes[3], entry(1))
    assert [cache.load(size) is not None for size in sizes] == [True, False, True, True]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4500


def test_an_entry_over_the_limit_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LIMIT_BYTES", 4500)
    cache = GraphCache("model", tmp_path)
    cache.store(SIZE, entry(1))
    assert not cache.store((64, 64), entry(1, 5000))
    assert cache.load(SIZE) is not None


def test_files_of_processes_that_were_killed_are_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / "old.pending", tmp_path / "new.pending"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    GraphCache("model", tmp_path).store(SIZE, entry(1))
    assert not old.exists()
    assert new.exists()


def test_nothing_is_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = GraphCache("model", tmp_path / "file" / "graphs")
    assert not cache.store(SIZE, entry(1))
    assert cache.load(SIZE) is None
    assert not GraphCache("model", None).store(SIZE, entry(1))


def test_a_write_that_fails_leaves_the_old_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = GraphCache("model", tmp_path)
    cache.store(SIZE, entry(1))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert not cache.store(SIZE, entry(2))
    found = cache.load(SIZE)
    assert found is not None
    assert found.outputs["boxes"].max() == 1
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
from pathlib import Path
from tests_entry import entry
from maskcast.engines.openvino.cache import GraphCache
cache = GraphCache("model", Path(sys.argv[1]))
fill = int(sys.argv[2])
for _ in range(100):
    assert cache.store((96, 160), entry(fill, 200_000))
    found = cache.load((96, 160))
    ((_, data),) = found.graphs["detector"]
    assert len(data) == 200_000 and set(data) == {int(found.outputs["boxes"].max())}
"""


def test_processes_that_start_together_find_complete_entries(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    code = WRITER.replace("tests_entry", Path(__file__).stem)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(fill)], env=environment)
        for fill in (1, 2, 3)
    ]
    assert [writer.wait(300) for writer in writers] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 1


def test_the_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/maskcast/openvino")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/maskcast/openvino")


def test_the_key_depends_on_the_graph_the_versions_and_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, other = tmp_path / "graph.onnx", tmp_path / "other.onnx"
    graph.write_bytes(b"graph")
    other.write_bytes(b"other")
    keys = [
        describe([graph], "2026.4", "f32", 1),
        describe([other], "2026.4", "f32", 1),
        describe([graph], "2026.5", "f32", 1),
        describe([graph], "2026.4", "f32", 2),
    ]
    monkeypatch.setattr(cache_module, "_cpu_kind", lambda: "another processor")
    keys.append(describe([graph], "2026.4", "f32", 1))
    monkeypatch.setattr(cache_module, "_code_digest", lambda: "other code")
    keys.append(describe([graph], "2026.4", "f32", 1))
    assert len(set(keys)) == 6
    assert describe([graph], "2026.4", "f32", 1) == keys[-1]
