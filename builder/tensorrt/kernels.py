"""Compile the CUDA kernels, so that a user's machine needs no compiler.

``python -m maskcast.builder.tensorrt.kernels`` writes ``kernels.fatbin`` (machine code for the
architectures below, PTX for later ones) and ``kernels.json`` (what it was made from). Build the
plugin library again afterwards: ``python -m maskcast.builder.tensorrt.plugin_library``.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from maskcast.engines.errors import InputError

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Turing, A100, Ampere, Ada, Hopper, Blackwell (data centre), Blackwell (RTX)."""

PLUGINS = Path(__file__).parents[2] / "engines" / "tensorrt" / "plugins"
_SOURCE = "kernels.cu"


class Usage(NamedTuple):
    """What ``ptxas -v`` reports about one kernel on one architecture; sizes in bytes."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class KernelsRecord(msgspec.Struct, frozen=True):
    """What ``kernels.fatbin`` was made from."""

    sources: dict[str, str]
    """SHA-256 of every source file."""
    compiler: str
    architectures: tuple[str, ...]
    kernels: tuple[str, ...]


def source_hashes(folder: Path = PLUGINS) -> dict[str, str]:
    """Return the SHA-256 of every CUDA source in ``folder``, by file name."""
    paths = [*folder.glob("*.cu"), *folder.glob("*.cuh"), folder / "arguments.h"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def compile_kernels(
    fatbin: Path, architectures: Sequence[str] = ARCHITECTURES, folder: Path = PLUGINS
) -> list[Usage]:
    """Compile all kernels to one fat binary; a warning of the compiler is an error.

    Raises:
        InputError: nvcc is missing, or the compilation fails.
    """
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise InputError("nvcc: not on the PATH; install the CUDA toolkit, version 13.0 or later")
    command = [
        compiler,
        "-fatbin",
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v,-warn-spills",
    ]
    for architecture in architectures:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    oldest = min(architectures, key=int)
    command += ["-gencode", f"arch=compute_{oldest},code=compute_{oldest}"]
    command += ["--compress-mode=size", "-o", str(fatbin), str(folder / _SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise InputError(f"nvcc cannot compile the kernels: {log.strip()[:2000]}")
    return _read_usage(log)


def compiler_version() -> str:
    """Return the version of nvcc, for example "13.0.88"."""
    log = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", log)
    return found.group(1) if found else "unknown"


def _read_usage(log: str) -> list[Usage]:
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    usages = []
    for found in pattern.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        usages.append(
            Usage(
                kernel=found["kernel"],
                architecture=found["architecture"],
                registers=int(found["registers"]),
                stack=int(found["stack"]),
                spill_stores=int(found["stores"]),
                spill_loads=int(found["loads"]),
                shared=int(shared.group(1)) if shared else 0,
            )
        )
    return usages


def main() -> None:
    """Compile into ``engines/tensorrt/plugins``."""
    with tempfile.TemporaryDirectory() as folder:
        fatbin = Path(folder) / "kernels.fatbin"
        usages = compile_kernels(fatbin)
        record = KernelsRecord(
            sources=source_hashes(),
            compiler=compiler_version(),
            architectures=ARCHITECTURES,
            kernels=tuple(sorted({usage.kernel for usage in usages})),
        )
        shutil.copy(fatbin, PLUGINS / "kernels.fatbin")
    text = msgspec.json.format(msgspec.json.encode(record), indent=2)
    (PLUGINS / "kernels.json").write_bytes(text + b"\n")


if __name__ == "__main__":
    main()
