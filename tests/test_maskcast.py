from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pytest
from PIL import Image

import maskcast

PUBLIC = [
    "Analysis",
    "Annotator",
    "Bundle",
    "ClientKeys",
    "ClientRights",
    "ClusterConfig",
    "Config",
    "ControlConfig",
    "CurveConfig",
    "Detections",
    "Distribution",
    "EndOfStreams",
    "Engine",
    "FixedInput",
    "Frame",
    "Gateway",
    "GatewayStats",
    "GraphFile",
    "Graphs",
    "Health",
    "InputError",
    "Instances",
    "JsonlRecorder",
    "KeyPair",
    "Keypoints",
    "LineConfig",
    "LongestSideInput",
    "Manifest",
    "MetricsConfig",
    "ModelConfig",
    "NetworkImage",
    "OutputConfig",
    "Patch",
    "Percentiles",
    "Pipeline",
    "Plan",
    "PolygonMasks",
    "PublishConfig",
    "Published",
    "PublishedFrame",
    "Recorder",
    "RleMasks",
    "ServerKeys",
    "SourceConfig",
    "SourceState",
    "SourceStats",
    "StageStats",
    "Stats",
    "StreamEvent",
    "Subscription",
    "Tally",
    "Timeline",
    "TracingConfig",
    "TrackEvent",
    "VideoRecorder",
    "WireError",
    "Witness",
    "ZoneConfig",
    "__version__",
    "default_bundle",
    "load_config",
    "load_engine",
    "main",
    "open_bundle",
    "predict",
    "record",
    "replay",
    "run",
    "subscribe",
]
HEAVY = ("torch", "torchvision", "onnx", "openvino", "onnxruntime", "tensorrt", "pycuda")


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(maskcast.__all__) == PUBLIC
    assert dir(maskcast) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(maskcast, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        maskcast.Nonsense  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(maskcast.__file__).read_text())
    imports = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    assert {name: module for module, name in imports} == maskcast._MODULE_OF


def test_every_type_in_a_public_signature_is_public() -> None:
    public = {getattr(maskcast, name) for name in PUBLIC if name not in ("__version__", "main")}
    for value in public:
        for place, hint in hints_of(value):
            for kind in classes_in(hint):
                is_ours = kind.__module__.startswith("maskcast")
                assert kind in public or not is_ours, f"{value.__name__} {place}: {kind.__name__}"


def hints_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the types of a function, or of a class's attributes and public methods."""
    parts = {value.__name__: value}
    if inspect.isclass(value):
        for name, member in inspect.getmembers(value):
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function) and (name == "__init__" or name[0] != "_"):
                parts[name] = function
    for name, part in parts.items():
        for argument, hint in get_type_hints(part, localns={"Image": Image}).items():
            if argument[0] != "_":
                yield f"{name}({argument})", hint


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes that a type is made of."""
    if isinstance(hint, list | tuple):
        for part in hint:
            yield from classes_in(part)
    elif get_origin(hint) is not None:
        yield from classes_in((get_origin(hint), *get_args(hint)))
    elif isinstance(hint, TypeVar):
        yield from classes_in(hint.__bound__)
    elif isinstance(hint, type):
        yield hint


def test_every_public_name_is_documented() -> None:
    for name in PUBLIC:
        if name != "__version__":
            assert getattr(maskcast, name).__doc__, name


def test_importing_loads_few_modules_beyond_numpy() -> None:
    # The time is measured by benchmarks/startup.py: it depends on what else the machine does.
    code = """
import sys
import numpy
before = len(sys.modules)
import maskcast
maskcast.subscribe, maskcast.Instances, maskcast.Pipeline, maskcast.load_engine
print(len(sys.modules) - before)
"""
    assert int(run_python(code)) < 400


def test_importing_needs_no_torch_and_no_inference_library() -> None:
    code = f"""
import sys
import maskcast
for name in maskcast.__all__:
    getattr(maskcast, name)
import maskcast.pipeline.cli.commands, maskcast.builder.commands
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_the_help_loads_no_numpy() -> None:
    code = """
import sys
import maskcast.pipeline.cli.commands, maskcast.builder.commands
print("numpy" in sys.modules)
"""
    assert run_python(code).strip() == "False"


def test_a_run_loads_no_event_loop_and_no_image_library_that_it_does_not_need() -> None:
    code = """
import sys
import maskcast.pipeline.cli.run, maskcast.pipeline.pipeline, maskcast.engines.load
print([name for name in ("asyncio", "ssl", "PIL") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_openvino_is_loaded_without_its_converter_which_sends_usage_data() -> None:
    code = """
import sys
from maskcast.engines.openvino.engine import openvino_core
openvino_core()
import maskcast.engines.openvino.streams
print([name for name in sys.modules if "telemetry" in name or name.startswith("openvino.tools.")])
import openvino.tools.ovc
print("still there for others")
"""
    assert run_python(code).splitlines() == ["[]", "still there for others"]


def test_graphs_from_the_cache_need_no_reader_of_onnx_and_no_random_numbers_of_numpy() -> None:
    code = """
import sys
import maskcast
engine = maskcast.load_engine()
while not engine.prepare(64, 96):
    pass
engine.close()
print([name for name in ("openvino.frontend.onnx", "numpy.random") if name in sys.modules])
"""
    run_python(code)
    assert run_python(code).strip() == "[]"


def test_a_subscriber_loads_neither_a_decoder_nor_an_engine() -> None:
    code = f"""
import sys
from maskcast import subscribe
subscription = subscribe("tcp://127.0.0.1:9").open()
subscription.close()
unwanted = [*{HEAVY}, "av", "typer", "rich", "yaml", "prometheus_client"]
unwanted += ["maskcast.pipeline.configuration.config", "maskcast.pipeline.pipeline"]
unwanted += ["maskcast.engines.engine"]
print([name for name in unwanted if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_each_package_imports_only_what_it_may() -> None:
    root = Path(maskcast.__file__).parent
    forbidden = {
        "engines": ("maskcast.pipeline", "maskcast.builder", "torch", "torchvision", "onnx"),
        "pipeline": ("maskcast.builder", "torch", "torchvision", "onnx"),
        "builder": ("maskcast.pipeline",),
    }
    for package, others in forbidden.items():
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in names:
                    assert not f"{name}.".startswith(tuple(f"{other}." for other in others)), (
                        f"{path}: imports {name}"
                    )


PIPELINE_ARROWS = {
    "wire": set(),
    "configuration": {"wire"},
    "publisher": {"wire"},
    "subscriber": {"wire"},
    "tracking": {"configuration"},
    "sources": {"configuration"},
    "outputs": {"configuration", "tracking"},
    "stages": {"configuration", "outputs", "publisher", "sources", "tracking", "wire"},
    "monitor": {"configuration", "sources"},
    "control": {"configuration", "publisher", "sources", "wire"},  # publisher: to limit the peers
    "clients": {"outputs", "publisher", "subscriber", "tracking", "wire"},  # outputs: to draw clips
    "cluster": {"configuration", "control", "monitor", "publisher", "sources", "stages"}
    | {"subscriber", "wire"},
}
"""Which folders of pipeline/ import which; its root modules are open to all."""
PIPELINE_ARROWS["cli"] = {*PIPELINE_ARROWS}  # everything


@pytest.mark.parametrize("folder", sorted(PIPELINE_ARROWS))
def test_imports_inside_the_pipeline_go_one_way(folder: str) -> None:
    root = Path(maskcast.__file__).parent / "pipeline"
    for path in (root / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                part = f"{node.module}.".removeprefix("maskcast.pipeline.").partition(".")[0]
                if (root / part).is_dir() and node.module.startswith("maskcast.pipeline."):
                    assert part in PIPELINE_ARROWS[folder] | {folder}, f"{path}: {node.module}"


def test_every_folder_of_the_pipeline_has_its_arrows() -> None:
    root = Path(maskcast.__file__).parent / "pipeline"
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert folders <= PIPELINE_ARROWS.keys()


def test_nothing_is_ever_pickled() -> None:
    root = Path(maskcast.__file__).parent
    for package in ("engines", "pipeline"):
        for path in (root / package).rglob("*.py"):
            assert "pickle" not in path.read_text(), path


def test_the_installed_version_is_the_one_in_the_source() -> None:
    try:
        installed = importlib.metadata.version("maskcast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("maskcast is not installed, it runs from its checkout")
    assert installed == maskcast.__version__
