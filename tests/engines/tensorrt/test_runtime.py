"""Compilation settings of TensorRT-RTX, and the file that caches compiled kernels."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
from host_tensorrt import make_bundle

from maskcast.engines.bundle import open_bundle
from maskcast.engines.tensorrt.plan import CACHE
from maskcast.engines.tensorrt.runtime import RuntimeCache, make_context


class Compiled:
    """``IRuntimeCache``: takes only what was made for the same GPU."""

    def __init__(self, content=b"gpu A: kernels"):
        self.content, self.offered = content, None

    def deserialize(self, blob):
        self.offered = bytes(blob)
        return self.offered.startswith(b"gpu A")

    def serialize(self):
        return self.content


class Config:
    """``IRuntimeConfig``, with the names that the package has."""

    def __init__(self, compiled):
        self.compiled, self.cache = compiled, None

    def create_runtime_cache(self):
        return self.compiled

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


def test_what_was_compiled_is_written_and_read_again(tmp_path):
    path = tmp_path / "runtime_cache" / "detector.8.9"
    first = Config(Compiled())
    RuntimeCache(first, path).save()
    assert first.cache is first.compiled
    assert path.read_bytes() == b"gpu A: kernels"
    assert [entry.name for entry in path.parent.iterdir()] == ["detector.8.9"]
    second = Compiled(b"gpu A: kernels")
    cache = RuntimeCache(Config(second), path)
    assert second.offered == b"gpu A: kernels"
    written = path.stat().st_mtime_ns
    cache.save()  # nothing new: the file is left alone
    assert path.stat().st_mtime_ns == written


def test_a_cache_of_another_gpu_is_replaced(tmp_path):
    path = tmp_path / "detector.8.9"
    path.write_bytes(b"gpu B: kernels")
    RuntimeCache(Config(Compiled()), path).save()
    assert path.read_bytes() == b"gpu A: kernels"


def test_a_bundle_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level("INFO"):
        RuntimeCache(Config(Compiled()), tmp_path / "file" / "detector.8.9").save()
    assert "it is compiled again next time" in caplog.text


def test_a_bundle_with_a_cache_in_its_folder_is_as_good_as_without(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle.path / CACHE / "detector.8.9"
    RuntimeCache(Config(Compiled()), path).save()
    assert path.exists()
    assert open_bundle(bundle.path) == bundle


class Strategy(Enum):
    EAGER = 0
    DISABLED = 1


def test_rtx_compiles_for_every_shape_at_once_and_leaves_cuda_graphs_to_the_engine(tmp_path):
    config = Config(Compiled())
    package = SimpleNamespace(
        DynamicShapesKernelSpecializationStrategy=Strategy, CudaGraphStrategy=Strategy
    )
    engine = SimpleNamespace(
        create_runtime_config=lambda: config,
        create_execution_context=lambda given: ("context", given),
    )
    context, cache = make_context(package, engine, tmp_path / "cache")
    assert context == ("context", config)
    assert config.dynamic_shapes_kernel_specialization_strategy is Strategy.EAGER
    assert config.cuda_graph_strategy is Strategy.DISABLED
    assert cache is not None


def test_tensorrt_has_nothing_to_compile_at_run_time(tmp_path):
    engine = SimpleNamespace(create_execution_context=lambda: "context")
    assert make_context(SimpleNamespace(), engine, tmp_path / "cache") == ("context", None)


def test_the_package_has_the_names_that_are_used():
    rtx = pytest.importorskip("tensorrt_rtx")
    assert hasattr(rtx.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(rtx.CudaGraphStrategy, "DISABLED")
    for name in (
        "dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy",
        "create_runtime_cache", "set_runtime_cache",
    ):  # fmt: skip
        assert hasattr(rtx.IRuntimeConfig, name), name
    assert hasattr(rtx.IRuntimeCache, "serialize")
    assert hasattr(rtx.IRuntimeCache, "deserialize")
    assert hasattr(rtx.IExecutionContext, "is_stream_capturable")
