"""Kernels and plugins under AddressSanitizer and UndefinedBehaviorSanitizer, on the host driver."""

from __future__ import annotations

import os
import subprocess

import pytest
from host_compiler import compile_program, header_options

from maskcast.builder.tensorrt.plugin_library import SOURCES
from maskcast.engines.tensorrt.plugins.library import FOLDER, NAME

SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Build driver, library and program with the sanitizers; return a function that runs it."""
    folder = tmp_path_factory.mktemp("sanitized")
    headers = header_options()
    driver, library = folder / "libcuda.so.1", folder / NAME
    name = f"-Wl,-soname,{driver.name}"
    compile_program(driver, "driver.cpp", "kernels.cpp", options=(*SANITIZE, "-shared", name))
    sources = [FOLDER / source for source in SOURCES]
    options = (*SANITIZE, "-shared", "-fvisibility=hidden", f"-Wa,-I,{FOLDER}", *headers)
    compile_program(library, *sources, options=options)
    sources = ["sanitize.cpp", "plugin_caller.cpp", driver]
    compile_program(folder / "sanitize", *sources, options=(*SANITIZE, *headers, "-ldl"))

    def run(*arguments):
        return subprocess.run(
            [folder / "sanitize", library, *arguments],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_kernels_and_plugins_touch_only_their_own_memory(program):
    done = program()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ERROR" not in done.stderr
    lines = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert "fault" not in done.stdout
    assert lines["device allocations"] == "0"
    kernels = ("nms_rank", "nms_overlap", "nms_select", "multiscale_roi_align_f16")
    for kernel in (*kernels, "preprocess_planes"):
        assert int(lines[f"launches of {kernel}"]) > 3


def test_a_byte_read_past_an_allocation_is_detected(program):
    done = program("overread")
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
