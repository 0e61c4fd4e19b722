"""Build TensorRT plans from a bundle's portable graphs, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import onnx
from msgspec.structs import replace
from onnx import ModelProto

import maskcast
from maskcast.builder.graph.float16 import compute_in_float16
from maskcast.builder.graph.folding import fold_layers
from maskcast.builder.graph.quantization import is_quantised, restore_float
from maskcast.builder.graph.size import FEATURES, fix_size, fold_shapes
from maskcast.builder.tensorrt.process import Built, Event, Failure, Profile, Progress, Request
from maskcast.builder.tensorrt.timing_cache import timing_cache_path
from maskcast.engines.bundle import FixedInput, Manifest, sha256
from maskcast.engines.errors import InputError
from maskcast.engines.plan import Package, Plan
from maskcast.engines.tensorrt.plugins.library import PLUGINS, compute_capability

if TYPE_CHECKING:
    from maskcast.builder.build import Report

USUAL_CAPABILITIES = ("8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for if none are given and there is no GPU."""

USUAL_BOXES = 8
"""Number of boxes up to which segmenter and poser have a profile of their own."""


def build_plans(
    folder: Path,
    manifest: Manifest,
    *,
    max_batch: int = 1,
    capabilities: Sequence[str] = (),
    report: Report = lambda phase, done, total: None,
    on_plan: Callable[[str, Built], None] = lambda graph, built: None,
) -> Manifest:
    """Build the plans of the graphs in a folder, and write them to that folder.

    Args:
        folder: folder of the bundle that is being built; holds its portable graphs.
        manifest: of that bundle; its backend, precision and input size are used. int8 needs graphs
            that are quantised already (Q/DQ nodes).
        max_batch: maximum number of images per batch; smaller batches run too.
        capabilities: compute capabilities to build for ("8.6"). By default that of the local GPU;
            ``tensorrt`` builds for no other.
        report: receives the progress.
        on_plan: called with the name of each graph and the result.

    Returns:
        The manifest with its plans.

    Raises:
        InputError: the package is missing, a capability is not supported, a graph cannot be
            built, or memory runs out.
    """
    package, size = _package(manifest), _size(manifest)
    targets = _targets(package, capabilities)
    plans = []
    max_boxes = 0  # per batch: the other graphs must take all that the detector returns
    for name, graph in manifest.graphs.present.items():
        source, target = folder / graph.file, folder / f"{name}.plan"
        model = prepare_graph(onnx.load(source), manifest.precision, size, source)
        max_boxes = max_boxes or max_batch * _detections(model)
        with tempfile.TemporaryDirectory() as scratch:
            prepared = Path(scratch) / f"{name}.onnx"
            onnx.save(model, prepared)
            request = Request(
                package=package,
                graph=str(prepared),
                plan=str(target),
                capabilities=targets if package == "tensorrt_rtx" else (),
                profiles=_profiles(model, max_batch, max_boxes),
                timing_cache=str(timing_cache_path()) if package == "tensorrt" else None,
            )
            outcome = _run(request, name, report)
        on_plan(name, outcome)
        plan = Plan(
            graph=name,
            file=target.name,
            sha256=sha256(target),
            package=package,
            version=outcome.version,
            capabilities=targets,
            precision=manifest.precision,
            height=size[0],
            width=size[1],
            max_batch=max_batch,
            max_boxes=0 if name == "detector" else max_boxes,
            graph_sha256=graph.sha256,
            plugins=PLUGINS,
        )
        plans.append(plan)
    return replace(manifest, plans=tuple(plans))


def prepare_graph(
    model: ModelProto, precision: str, size: tuple[int, int], source: Path
) -> ModelProto:
    """Write the size and the precision into a portable graph; returns the same model.

    Raises:
        InputError: ``precision`` is int8 and the graph has no Q/DQ nodes.
    """
    if precision == "int8" and not is_quantised(model):
        raise InputError(
            f"{source}: --precision int8 needs a graph with quantisation (Q/DQ nodes); "
            "quantise the bundle first, or choose --precision fp16"
        )
    if precision != "int8":
        restore_float(model)
        fold_layers(model)
    fix_size(model, *size)
    fold_shapes(model)
    if precision in ("fp16", "int8"):  # int8: the layers that are not quantised
        compute_in_float16(model)
    return model


def _package(manifest: Manifest) -> Package:
    if manifest.backend not in ("tensorrt", "tensorrt_rtx"):
        raise ValueError(f"no plans are built for {manifest.backend}")
    return manifest.backend


def _size(manifest: Manifest) -> tuple[int, int]:
    if not isinstance(manifest.input, FixedInput):
        raise InputError("TensorRT needs a fixed input size; give --size HEIGHTxWIDTH")
    return manifest.input.height, manifest.input.width


def _targets(package: Package, capabilities: Sequence[str]) -> tuple[str, ...]:
    here = compute_capability()
    local = f"{here[0]}.{here[1]}" if here else None
    if package == "tensorrt_rtx":
        return tuple(capabilities) or ((local,) if local else USUAL_CAPABILITIES)
    if local is None:
        raise InputError(
            "--backend tensorrt: needs an NVIDIA GPU and driver, which this machine lacks; "
            "--backend tensorrt_rtx builds anywhere, for RTX cards"
        )
    if any(capability != local for capability in capabilities):
        raise InputError(
            f"--compute-capability {' '.join(capabilities)}: tensorrt builds for the local GPU "
            f"only, which has {local}; choose --backend tensorrt_rtx to build for others"
        )
    return (local,)


def _detections(detector: ModelProto) -> int:
    """Return the number of boxes that a detector returns per image, unused places included."""
    sides = [o.type.tensor_type.shape.dim for o in detector.graph.output if o.name == "boxes"]
    return int(sides[0][1].dim_value) if sides else 0


def _profiles(model: ModelProto, max_batch: int, max_boxes: int) -> tuple[Profile, ...]:
    """Return the ranges of shapes that TensorRT chooses kernels for.

    The first profile takes every shape, for programs that do not select one. Its kernels are chosen
    for a full batch, and for all boxes of one image. The second profile takes the shapes of live
    video: one image, and the boxes of a few instances.
    """
    inputs = {
        value.name: tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim[1:])
        for value in model.graph.input
    }
    of_images = {name for name in inputs if name in ("images", "sizes", *FEATURES)}

    def profile(images: tuple[int, int, int], boxes: tuple[int, int, int]) -> Profile:
        shapes: Profile = {}
        for name, rest in inputs.items():
            smallest, usual, largest = images if name in of_images else boxes
            shapes[name] = (smallest, *rest), (usual, *rest), (largest, *rest)
        return shapes

    batch = (1, max_batch, max_batch)
    profiles = [profile(batch, (1, max_boxes // max_batch, max_boxes))]
    if of_images == set(inputs):
        if max_batch > 1:
            profiles.append(profile((1, 1, 1), (0, 0, 0)))
    elif max_boxes > USUAL_BOXES:
        profiles.append(profile(batch, (1, USUAL_BOXES, USUAL_BOXES)))
    return tuple(profiles)


def _run(request: Request, name: str, report: Report) -> Built:
    """Build in a child process; raise an ``InputError`` if it fails."""
    root = str(Path(maskcast.__file__).parents[1])
    command = [sys.executable, "-P", "-m", "maskcast.builder.tensorrt.process"]
    with _library_folder(request.package) as libraries, tempfile.TemporaryFile() as log:
        environment = dict(os.environ)
        _prepend(environment, "PYTHONPATH", root)
        if libraries:
            _prepend(environment, "LD_LIBRARY_PATH", libraries)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(msgspec.json.encode(request))
            child.stdin.close()
            end: Failure | Built | None = None
            for line in child.stdout:
                event = msgspec.json.decode(line, type=Event)
                if isinstance(event, Progress):
                    report(f"{name}: {event.phase}", event.done, event.total)
                else:
                    end = event
        log.seek(0)
        stderr = log.read().decode(errors="replace").strip()[-500:]
    if isinstance(end, Built) and child.returncode == 0:
        return end
    if isinstance(end, Failure):
        raise _as_input_error(end, request, name)
    raise InputError(_exit_message(request.package, name, child.returncode, stderr))


def _as_input_error(failure: Failure, request: Request, name: str) -> InputError:
    package, detail = request.package, failure.detail
    if failure.kind == "absent":
        extra = "tensorrt" if package == "tensorrt" else "rtx"
        return InputError(f"{package} is not installed: pip install 'maskcast[{extra}]' ({detail})")
    if failure.kind == "capability":
        return InputError(
            f"--compute-capability: {package} does not support {detail}; for data-centre cards "
            "(9.0, 10.0) choose --backend tensorrt on the machine that has the card"
        )
    if failure.kind == "operator":
        return InputError(f"{package} does not support an operator of the {name}: {detail}")
    if "memory" in detail.lower() or "bad_alloc" in detail:
        return InputError(
            f"{package} ran out of memory while building the {name} ({detail}); "
            "choose a smaller --size or --batch"
        )
    return InputError(f"{package} cannot build the {name}: {detail}")


def _exit_message(package: str, name: str, status: int, stderr: str) -> str:
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        hint = "; the memory may have run out" if -status == signal.SIGKILL else ""
    else:
        how, hint = f"exited with status {status}", ""
    reason = f": {' '.join(stderr.split())}" if stderr else ""
    return f"{package}'s builder {how} while building the {name}{hint}{reason}"


@contextmanager
def _library_folder(package: Package) -> Iterator[str | None]:
    """Yield a folder with TensorRT-RTX under the name that its ONNX parser opens, if needed.

    The parser opens ``libtensorrt_rtx.so``, but the wheel has only ``libtensorrt_rtx.so.1``.
    Without this folder the process ends at the first plugin.
    """
    found = find_spec("tensorrt_rtx_libs") if package == "tensorrt_rtx" else None
    if found is None or not found.submodule_search_locations:
        yield None
        return
    libraries = Path(next(iter(found.submodule_search_locations)))
    with tempfile.TemporaryDirectory() as folder:
        for library in libraries.glob("libtensorrt_rtx.so.*"):
            (Path(folder) / "libtensorrt_rtx.so").symlink_to(library)
            break
        yield folder


def _prepend(environment: dict[str, str], name: str, value: str) -> None:
    environment[name] = os.pathsep.join(filter(None, (value, environment.get(name))))
