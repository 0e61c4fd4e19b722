"""Compile the native plugin library: needs g++ and the headers of TensorRT and CUDA, no GPU.

``python -m maskcast.builder.tensorrt.plugin_library`` writes ``libmaskcast_plugins.so`` for this
machine's processor where the engine looks for it. The CUDA kernels inside are the compiled ones of
``maskcast.builder.tensorrt.kernels``; nvcc is not needed. TensorRT's headers are downloaded
(``maskcast.builder.tensorrt.headers``) unless ``--tensorrt-headers`` names a folder that has them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from maskcast.builder.tensorrt.headers import fetch_headers
from maskcast.engines.errors import InputError
from maskcast.engines.tensorrt.plugins.library import FOLDER, NAME

SOURCES = ("plugins.cpp", "driver.cpp", "functions.cpp")
OPTIONS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
STRIPPED = ("-s",)
"""Further options for the library that is shipped."""


class LibraryRecord(msgspec.Struct, frozen=True):
    """What a library was made from.

    Attributes:
        sources: SHA-256 of every source file and of the kernels.
        compiler: its name and version.
        tensorrt: version of the headers.
    """

    sources: dict[str, str]
    compiler: str
    tensorrt: str


def library_sources(folder: Path = FOLDER) -> dict[str, str]:
    """Return the SHA-256 of every file that the library is made from, by file name."""
    paths = sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "kernels.fatbin"])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def compile_library(
    library: Path, headers: Path, *, compiler: str = "g++", options: Sequence[str] = ()
) -> None:
    """Compile the library; a warning is an error.

    Args:
        library: the file to write.
        headers: folder of TensorRT's headers, 10.12 or later.
        compiler: g++, or one for another processor.
        options: further compiler options.

    Raises:
        InputError: the compiler or the headers are missing, or the compilation fails.
    """
    if shutil.which(compiler) is None:
        raise InputError(f"{compiler}: not on the PATH; install it")
    command = [compiler, *OPTIONS, "-Werror", "-I", str(FOLDER), "-Wa,-I," + str(FOLDER)]
    command += ["-isystem", str(check_headers(headers)), "-isystem", str(cuda_headers())]
    command += [*(str(FOLDER / source) for source in SOURCES), "-o", str(library), *options, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"{compiler} cannot compile the plugins: {done.stderr.strip()[:2000]}")


def check_headers(folder: Path) -> Path:
    """Check that a folder holds TensorRT's headers; returns it.

    Raises:
        InputError: the folder does not.
    """
    if not (folder / "NvInferRuntime.h").is_file():
        raise InputError(
            f"{folder}: holds no NvInferRuntime.h; give the include folder of TensorRT 10.12 or "
            "later, or leave --tensorrt-headers out to download it"
        )
    return folder


def cuda_headers() -> Path:
    """Find the folder of cuda_runtime_api.h, in a CUDA toolkit or in the wheel of torch's CUDA.

    Raises:
        InputError: the header is not found.
    """
    candidates = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    candidates.append(Path("/usr/local/cuda/include"))
    candidates.append(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include")
    for folder in candidates:
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise InputError("cuda_runtime_api.h: not found; install the CUDA toolkit or set CUDA_HOME")


def tensorrt_version(headers: Path) -> str:
    """Return the version of TensorRT's headers, for example "11.1.0"."""
    text = (headers / "NvInferVersion.h").read_text()
    parts = (
        re.search(rf"#define TRT_{name}_ENTERPRISE (\d+)", text)
        or re.search(rf"#define NV_TENSORRT_{name} (\d+)", text)
        for name in ("MAJOR", "MINOR", "PATCH")
    )
    return ".".join(found[1] if found else "?" for found in parts)


def compiler_version(compiler: str) -> str:
    """Return the name and version of a compiler, in one line."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Compile the library where the engine looks for it."""
    parser = argparse.ArgumentParser(description="Compile the TensorRT plugin library.")
    parser.add_argument(
        "--tensorrt-headers", type=Path, help="folder with NvInferRuntime.h (downloaded)"
    )
    parser.add_argument("--compiler", default="g++", help="C++ compiler (g++)")
    parser.add_argument(
        "--machine", default=platform.machine(), help="target processor (this machine's)"
    )
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as downloaded:
            headers = arguments.tensorrt_headers or Path(downloaded)
            if arguments.tensorrt_headers is None:
                fetch_headers(headers)
            install_library(headers, arguments.compiler, arguments.machine)
    except InputError as error:
        parser.exit(2, f"{error}\n")


def install_library(headers: Path, compiler: str, machine: str) -> None:
    """Compile the library for a processor, and record what it was made from.

    Raises:
        InputError: as for ``compile_library``.
    """
    folder = FOLDER / "lib" / machine
    folder.mkdir(parents=True, exist_ok=True)
    compile_library(folder / NAME, headers, compiler=compiler, options=STRIPPED)
    record = LibraryRecord(
        sources=library_sources(),
        compiler=compiler_version(compiler),
        tensorrt=tensorrt_version(headers),
    )
    text = msgspec.json.format(msgspec.json.encode(record), indent=2)
    (folder / "library.json").write_bytes(text + b"\n")


if __name__ == "__main__":
    main()
