"""The kernels compile for every architecture, and what is shipped was made from these sources."""

from __future__ import annotations

import shutil

import msgspec
import pytest

from maskcast.builder.tensorrt.kernels import (
    ARCHITECTURES,
    PLUGINS,
    KernelsRecord,
    compile_kernels,
    source_hashes,
)
from maskcast.engines.errors import InputError

KERNELS = {
    "multiscale_roi_align_f32", "multiscale_roi_align_f16", "nms_rank", "nms_overlap",
    "nms_select", "preprocess", "preprocess_planes", "crops_to_bytes",
}  # fmt: skip

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed: kernels cannot be compiled"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    fatbin = tmp_path_factory.mktemp("kernels") / "kernels.fatbin"
    return compile_kernels(fatbin), fatbin.read_bytes()


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_a_warning_a_spill_or_a_stack(compiled, architecture):
    usages = [usage for usage in compiled[0] if usage.architecture == architecture]
    assert {usage.kernel for usage in usages} == KERNELS
    for usage in usages:
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), usage
        assert usage.registers <= 64, usage  # at least 1024 threads on a multiprocessor
        assert usage.shared <= 48 * 1024, usage


@needs_nvcc
def test_a_warning_of_the_compiler_is_an_error(tmp_path):
    for source in (*PLUGINS.glob("*.cu"), *PLUGINS.glob("*.cuh"), PLUGINS / "arguments.h"):
        shutil.copy(source, tmp_path)
    with (tmp_path / "kernels.cu").open("a") as source:
        source.write("__global__ void careless(int* out) { int unused; out[0] = 1; }\n")
    with pytest.raises(InputError, match="unused"):
        compile_kernels(tmp_path / "kernels.fatbin", ["86"], tmp_path)


def test_without_nvcc_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="install the CUDA toolkit"):
        compile_kernels(tmp_path / "kernels.fatbin")


def test_the_shipped_binary_was_made_from_the_sources_next_to_it():
    record = msgspec.json.decode((PLUGINS / "kernels.json").read_bytes(), type=KernelsRecord)
    assert record.sources == source_hashes(), (
        "run `python -m maskcast.builder.tensorrt.kernels` and commit the result"
    )
    assert set(record.kernels) == KERNELS
    assert record.architectures == ARCHITECTURES
    assert (PLUGINS / "kernels.fatbin").stat().st_size > 10_000
