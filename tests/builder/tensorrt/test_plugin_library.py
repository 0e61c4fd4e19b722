"""The native plugin library: what is shipped, and that it can be built again."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from host_compiler import compile_program, header_options, tensorrt_headers

from maskcast.builder.tensorrt.plugin_library import (
    STRIPPED,
    LibraryRecord,
    check_headers,
    compile_library,
    compiler_version,
    cuda_headers,
    library_sources,
    tensorrt_version,
)
from maskcast.engines.errors import InputError
from maskcast.engines.tensorrt.plugins.library import FOLDER, NAME, NAMESPACE, PLUGINS

SHIPPED = FOLDER / "lib" / "x86_64"

# Each package in a process of its own: two TensorRTs in one share symbols.
REGISTER = """
import sys
from importlib import import_module
from maskcast.engines.tensorrt.plugins.library import NAMESPACE, PLUGINS, register
trt = import_module(sys.argv[1])
before = {creator.name for creator in trt.get_plugin_registry().all_creators}
register(trt)
register(trt)  # a second time is harmless
registry = trt.get_plugin_registry()
for name, version in PLUGINS.items():
    creator = registry.get_creator(name, version, NAMESPACE)
    given = [(field.name, field.type.name, field.data.tolist()) for field in creator.field_names]
    print(name, creator.plugin_version, given)
"""

# TensorRT 10 and 11 give a plugin library logger finders whose functions have different places.
# This one has none at all.
REFUSE = """
import ctypes
import sys
from importlib import import_module
import numpy as np
from maskcast.engines.tensorrt.plugins.library import NAMESPACE, library_path, register
trt = import_module(sys.argv[1])
register(trt)
no_functions = (ctypes.c_void_p * 8)()
finder = ctypes.c_void_p(ctypes.addressof(no_functions))
ctypes.CDLL(str(library_path())).setLoggerFinder(ctypes.byref(finder))
creator = trt.get_plugin_registry().get_creator("GroupedNms", "1", NAMESPACE)
value = np.array([2.5])
field = trt.PluginField("max_output", value, trt.PluginFieldType.FLOAT64)
fields = trt.PluginFieldCollection([field])
assert creator.create_plugin("layer", fields, trt.TensorRTPhase.BUILD) is None
"""
PACKAGES = ("tensorrt_rtx", "tensorrt_lean_bindings")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")


def test_the_shipped_library_was_made_from_the_sources_next_to_it():
    record = msgspec.json.decode((SHIPPED / "library.json").read_bytes(), type=LibraryRecord)
    assert record.sources == library_sources(), (
        "run `python -m maskcast.builder.tensorrt.plugin_library`"
    )
    assert (FOLDER / "kernels.fatbin").read_bytes() in (SHIPPED / NAME).read_bytes()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
def test_the_shipped_library_links_neither_cuda_nor_tensorrt_and_runs_on_old_systems():
    text = subprocess.run(
        ["objdump", "-p", "-T", SHIPPED / NAME], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED\s+(\S+)", text))
    assert needed <= {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    newest = max(tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", text))
    assert newest <= (2, 34)
    newest = max(tuple(map(int, v.split("."))) for v in re.findall(r"GLIBCXX_([\d.]+)", text))
    assert newest <= (3, 4, 25)
    exported = set(re.findall(r"\.text\s+\S+\s+(?:Base\s+)?(\w+)$", text, re.MULTILINE))
    assert {"getCreators", "setLoggerFinder", "maskcast_load"} <= exported
    assert all(re.match(r"getCreators|setLoggerFinder|maskcast_", name) for name in exported)


def run_with(module, program):
    """Run a program with a package of TensorRT; returns what it prints."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", program, module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@needs_x86
@pytest.mark.parametrize("module", PACKAGES)
def test_a_plugin_says_why_it_refuses_its_attributes_with_any_logger_finder(module):
    said = run_with(module, REFUSE).stderr
    assert "maskcast: GroupedNms: an attribute is not one number of its type" in said


@needs_x86
@pytest.mark.parametrize("module", PACKAGES)
def test_tensorrt_registers_the_plugins_with_their_attributes(module):
    align, nms = run_with(module, REGISTER).stdout.splitlines()
    assert align == (
        "MultiscaleRoiAlign 1 [('output_size', 'INT32', [7]), ('sampling_ratio', 'INT32', [2]), "
        "('aligned', 'INT32', [0])]"
    )
    assert nms == (
        "GroupedNms 1 [('iou_threshold', 'FLOAT32', [0.5]), ('score_threshold', 'FLOAT32', [0.0]), "
        "('max_output', 'INT32', [100])]"
    )
    assert (NAMESPACE, set(PLUGINS)) == ("maskcast", {"MultiscaleRoiAlign", "GroupedNms"})


@pytest.fixture
def headers():
    headers = tensorrt_headers()
    try:
        cuda_headers()
    except InputError as error:
        pytest.skip(str(error))
    return headers


@pytest.mark.parametrize("compiler", ["g++", "aarch64-linux-gnu-g++"])
def test_it_compiles_without_a_warning(tmp_path, headers, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    compile_library(tmp_path / NAME, headers, compiler=compiler)
    machine = (tmp_path / NAME).read_bytes()[18:20]
    assert machine == {"g": b"\x3e\x00", "a": b"\xb7\x00"}[compiler[0]]  # of the ELF header
    assert re.fullmatch(r"1\d\.\d+\.\d+", tensorrt_version(headers))


def test_the_shipped_library_is_what_its_sources_give(tmp_path, headers):
    record = msgspec.json.decode((SHIPPED / "library.json").read_bytes(), type=LibraryRecord)
    if compiler_version("g++") != record.compiler or platform.machine() != "x86_64":
        pytest.skip(f"it was compiled with {record.compiler}")
    compile_library(tmp_path / NAME, headers, options=STRIPPED)
    assert (tmp_path / NAME).read_bytes() == (SHIPPED / NAME).read_bytes()


def test_the_example_in_cpp_compiles_against_the_headers(tmp_path, headers):
    example = Path(__file__).parents[3] / "examples" / "tensorrt" / "detect.cpp"
    compile_program(tmp_path / "detect.o", "-c", example, options=header_options())


def test_a_folder_without_the_headers_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no NvInferRuntime\.h; give the include folder"):
        check_headers(tmp_path)


def test_without_a_compiler_the_error_names_it(tmp_path):
    with pytest.raises(InputError, match="no-such-g\\+\\+: not on the PATH; install it"):
        compile_library(tmp_path / NAME, tmp_path, compiler="no-such-g++")
