"""Compilation settings of TensorRT-RTX, and the file that caches compiled kernels."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
from host_tensorrt import make_bundle

from maskcast.engines.bundle import open_bundle
from maskcast.engines.tensorrt.plan import CACHE
from maskcast.engines.tensorrt.runtime import RuntimeCache, make_contexts


class Compiled:
    """``IRuntimeCache``: accepts only what was made for the same GPU."""

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

    def set_execution_context_allocation_strategy(self, memory):
        self.memory = memory


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
    assert caplog.records[-1].getMessage() == "runtime_cache_not_written"


def test_a_cache_in_its_folder_does_not_change_a_bundle(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle.path / CACHE / "detector.8.9"
    RuntimeCache(Config(Compiled()), path).save()
    assert path.exists()
    assert open_bundle(bundle.path) == bundle


class Strategy(Enum):
    EAGER = 0
    DISABLED = 1
    ON_PROFILE_CHANGE = 2


class Context:
    """``IExecutionContext``, with the method that sets a profile."""

    def __init__(self, how, taken):
        self.how, self.taken, self.profile = how, taken, None

    def set_optimization_profile_async(self, profile, stream):
        assert stream == 0
        self.profile = profile
        return self.taken


def engine_double(config=None, *, taken=True):
    return SimpleNamespace(
        num_optimization_profiles=2,
        create_runtime_config=lambda: config,
        create_execution_context=lambda how: Context(how, taken),
    )


def test_rtx_compiles_for_every_shape_at_once_and_leaves_cuda_graphs_to_the_engine(tmp_path):
    config = Config(Compiled())
    package = SimpleNamespace(
        DynamicShapesKernelSpecializationStrategy=Strategy,
        CudaGraphStrategy=Strategy,
        ExecutionContextAllocationStrategy=Strategy,
    )
    contexts, cache = make_contexts(package, engine_double(config), tmp_path / "cache")
    assert [(context.how, context.profile) for context in contexts] == [(config, 0), (config, 1)]
    assert config.dynamic_shapes_kernel_specialization_strategy is Strategy.EAGER
    assert config.cuda_graph_strategy is Strategy.DISABLED
    assert config.memory is Strategy.ON_PROFILE_CHANGE
    assert cache is not None


def test_tensorrt_has_nothing_to_compile_at_run_time(tmp_path):
    package = SimpleNamespace(ExecutionContextAllocationStrategy=Strategy)
    contexts, cache = make_contexts(package, engine_double(), tmp_path / "cache")
    assert cache is None
    assert [context.profile for context in contexts] == [0, 1]
    # Each context has the memory that its own profile needs.
    assert {context.how for context in contexts} == {Strategy.ON_PROFILE_CHANGE}


def test_a_profile_that_finds_no_memory_has_no_context(tmp_path):
    package = SimpleNamespace(ExecutionContextAllocationStrategy=Strategy)
    contexts, _ = make_contexts(package, engine_double(taken=False), tmp_path / "cache")
    assert contexts == [None, None]


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt_lean_bindings"])
def test_the_packages_have_the_calls_that_choose_a_profile(module):
    trt = pytest.importorskip(module)
    assert hasattr(trt.ExecutionContextAllocationStrategy, "ON_PROFILE_CHANGE")
    assert hasattr(trt.IExecutionContext, "set_optimization_profile_async")
    assert hasattr(trt.ICudaEngine, "num_optimization_profiles")
    assert hasattr(trt.ICudaEngine, "get_tensor_profile_shape")


def test_the_package_has_the_names_that_are_used():
    rtx = pytest.importorskip("tensorrt_rtx")
    assert hasattr(rtx.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(rtx.CudaGraphStrategy, "DISABLED")
    for name in (
        "dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy",
        "create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy",
    ):  # fmt: skip
        assert hasattr(rtx.IRuntimeConfig, name), name
    assert hasattr(rtx.IRuntimeCache, "serialize")
    assert hasattr(rtx.IRuntimeCache, "deserialize")
    assert hasattr(rtx.IExecutionContext, "is_stream_capturable")
