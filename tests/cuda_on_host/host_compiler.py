"""Compiler calls for the tests: kernels for the host, programs against TensorRT's headers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest

from maskcast.builder.tensorrt.plugin_library import cuda_headers
from maskcast.engines.errors import InputError

CUDA_ON_HOST = Path(__file__).parent


def compile_on_host(output: Path, *sources: str | Path, options: tuple[str, ...] = ()) -> Path:
    """Compile sources of tests/cuda_on_host to a shared library with g++."""
    return compile_program(output, *sources, options=("-O2", "-shared", *options))


def compile_program(output: Path, *sources: str | Path, options: tuple[str, ...] = ()) -> Path:
    """Compile sources of tests/cuda_on_host with g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the kernels cannot be compiled for the host")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-fPIC", "-I."]
    # Kernels contain nvcc's unrolling pragmas; contraction would round differently from the GPU.
    command += ["-Wno-unknown-pragmas", "-ffp-contract=off", "-std=c++17"]
    command += [*map(str, sources), "-o", str(output), *options]
    done = subprocess.run(command, cwd=CUDA_ON_HOST, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def tensorrt_headers() -> Path:
    """Find TensorRT's headers, or skip the test.

    ``make test`` downloads them into the virtual environment; MASKCAST_TENSORRT_HEADERS names
    another folder.
    """
    downloaded = Path(sys.prefix) / "tensorrt-headers"
    folder = Path(os.environ.get("MASKCAST_TENSORRT_HEADERS", downloaded))
    if not (folder / "NvInferRuntime.h").is_file():
        pytest.skip(
            f"no TensorRT headers: `python -m maskcast.builder.tensorrt.headers {downloaded}`"
        )
    return folder


def header_options() -> tuple[str, ...]:
    """Options of g++ that find TensorRT's and CUDA's headers; skips where there are none."""
    try:
        return (f"-isystem{tensorrt_headers()}", f"-isystem{cuda_headers()}")
    except InputError as error:
        pytest.skip(str(error))


def build_host_driver(folder: Path) -> None:
    """Build libcuda.so.1 over host memory, and the other libraries that pycuda and FFmpeg load.

    pycuda links libcurand.so.10; FFmpeg decodes with libnvcuvid.so.1.
    """
    specification = importlib.util.find_spec("pycuda")
    assert specification is not None
    assert specification.origin is not None
    module = next(Path(specification.origin).parent.glob("_driver*.so"))
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r" U (cu[A-Z]\w+)", symbols)) | _names_in_ffmpeg()
    source = (CUDA_ON_HOST / "driver.cpp").read_text()
    made = set(re.findall(r"^\w+ (cu\w+)\(", source, re.MULTILINE))
    absent = folder / "absent.cpp"  # functions that are looked up but never called: not supported
    lines = (f'extern "C" int {name}() {{ return 801; }}' for name in sorted(needed - made))
    absent.write_text("\n".join(lines))
    compile_on_host(
        folder / "libcuda.so.1", "driver.cpp", "kernels.cpp", absent,
        options=("-Wl,-soname,libcuda.so.1",),
    )  # fmt: skip
    driver = folder / "libcuda.so.1"
    options = ("-Wl,-soname,libnvcuvid.so.1", str(driver))
    compile_on_host(folder / "libnvcuvid.so.1", "nvcuvid.cpp", options=options)
    versions = "-Wl,-soname,libcurand.so.10,--version-script=curand.map"
    compile_on_host(folder / "libcurand.so.10", "curand.cpp", options=(versions,))


def _names_in_ffmpeg() -> set[str]:
    """Return the names of the driver's functions that the FFmpeg in PyAV's wheel looks up."""
    names: set[str] = set()
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("libav[cu]*.so*"):
        found = re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", library.read_bytes())
        names.update(name.decode() for name in found)
    return names
