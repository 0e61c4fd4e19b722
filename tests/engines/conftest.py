from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from engines.plugins.launch import Launch

CUDA_ON_HOST = Path(__file__).parents[1] / "cuda_on_host"


def compile_on_host(sources: list[str], library: Path, *options: str) -> Path:
    """Compile sources of tests/cuda_on_host to a shared library with g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the kernels cannot be compiled for the host")
    command = [compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    # Kernels carry nvcc's unrolling pragmas; contraction would round otherwise than the GPU does.
    command += ["-Wno-unknown-pragmas", "-ffp-contract=off", "-shared", "-fPIC", "-I."]
    command += [*sources, "-o", str(library), *options]
    done = subprocess.run(command, cwd=CUDA_ON_HOST, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class HostKernels:
    """Runs the project's CUDA kernels, compiled for the host, on host memory."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(self, *launches: Launch, backwards: bool = False) -> None:
        """Run launches in order; backwards turns the order of threads and blocks around."""
        for launch in launches:
            status = self._library.host_launch(
                launch.kernel.encode(),
                ctypes.byref(launch.arguments),
                ctypes.c_size_t(ctypes.sizeof(launch.arguments)),
                (ctypes.c_uint * 3)(*launch.grid),
                (ctypes.c_uint * 3)(*launch.block),
                int(backwards),
            )
            assert status == 0, f"no kernel {launch.kernel} takes arguments of this size"


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    folder = tmp_path_factory.mktemp("kernels")
    return HostKernels(compile_on_host(["kernels.cpp"], folder / "libkernels.so"))
