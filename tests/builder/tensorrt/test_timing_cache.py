"""The timing cache, with a double of the builder's configuration: TensorRT needs a GPU to build."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from maskcast.builder.tensorrt.timing_cache import (
    load_timing_cache,
    save_timing_cache,
    timing_cache_path,
)


class Config:
    """``IBuilderConfig``: takes an empty cache, and one of this GPU."""

    def __init__(self):
        self.cache = None

    def create_timing_cache(self, content):
        return SimpleNamespace(content=content, serialize=lambda: content + b" gpu A")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content not in (b"", b" gpu A"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


def test_a_build_reads_the_measurements_of_the_one_before(tmp_path):
    path = tmp_path / "maskcast" / "timing"
    first, second = Config(), Config()
    load_timing_cache(first, path)
    save_timing_cache(first, path)
    load_timing_cache(second, path)
    assert second.cache.content == b" gpu A"
    assert [entry.name for entry in path.parent.iterdir()] == ["timing"]


def test_a_cache_of_another_gpu_is_left_out(tmp_path):
    path = tmp_path / "timing"
    path.write_bytes(b" gpu B")
    config = Config()
    load_timing_cache(config, path)
    assert config.cache.content == b""


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    config = Config()
    load_timing_cache(config, tmp_path / "file" / "timing")
    save_timing_cache(config, tmp_path / "file" / "timing")


def test_it_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache_path() == tmp_path / "maskcast" / "tensorrt_timing"


def test_tensorrt_has_the_methods_of_the_double():
    rtx = pytest.importorskip("tensorrt_rtx")
    for name in ("create_timing_cache", "set_timing_cache", "get_timing_cache"):
        assert hasattr(rtx.IBuilderConfig, name)
