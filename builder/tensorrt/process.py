"""The process in which TensorRT builds one plan; ``maskcast.builder.tensorrt.plans`` starts it.

TensorRT can end its process without an exception, so it runs in one of its own. The request comes
as JSON on standard input; events go to standard output as lines of JSON. What TensorRT prints goes
to standard error.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import msgspec

from maskcast.builder.tensorrt.timing_cache import load_timing_cache, save_timing_cache
from maskcast.engines.plan import Package

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of every input."""


class Request(msgspec.Struct, frozen=True):
    """One plan to build.

    Attributes:
        package: the module that builds.
        graph: path of an ONNX file.
        plan: path to write to.
        capabilities: for ``tensorrt_rtx``: "8.6", ...; empty: the local GPU.
        profiles: ranges of shapes that kernels are chosen for.
        timing_cache: file of TensorRT's measurements; None for ``tensorrt_rtx``, which has none.
    """

    package: Package
    graph: str
    plan: str
    capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    timing_cache: str | None = None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """``done`` of ``total`` steps of a phase of the build."""

    phase: str
    done: int
    total: int


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """The plan could not be built."""

    kind: Literal["absent", "capability", "operator", "build"]
    detail: str


class Built(msgspec.Struct, frozen=True, tag="built", kw_only=True):
    """The plan was built.

    Attributes:
        version: of the package.
        parse_s, build_s: seconds.
        peak_rss_bytes: of the whole process.
        plan_bytes: size of the plan.
        layers: number of layers of the parsed network, by type.
        tensors: element types of the network's inputs and outputs.
        computes_in: how many convolutions and matrix products have outputs of each type.
        plugins: input types of each plugin layer, by the layer's name.
    """

    version: str
    parse_s: float
    build_s: float
    peak_rss_bytes: int
    plan_bytes: int
    layers: dict[str, int]
    tensors: dict[str, str]
    computes_in: dict[str, int]
    plugins: dict[str, tuple[str, ...]]


Event = Progress | Failure | Built


class _BuildError(Exception):
    def __init__(self, kind: Any, detail: str) -> None:
        super().__init__(detail)
        self.failure = Failure(kind, detail)


def main() -> None:
    """Build the plan that standard input requests."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def send(event: Event) -> None:
        events.write(msgspec.json.encode(event) + b"\n")

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        send(_build(request, send))
    except _BuildError as failed:
        send(failed.failure)
    except MemoryError:
        send(Failure("build", "out of memory"))


def _build(request: Request, send: Any) -> Built:
    try:
        trt = import_module(request.package)
    except (ImportError, OSError) as error:
        raise _BuildError("absent", str(error)) from error
    from maskcast.engines.tensorrt.plugins.library import register

    logger = _logger(trt)
    register(trt)
    builder = trt.Builder(logger)
    # 11.x has only typed networks and may not have the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is float32; fp16 is the fast choice
    if request.capabilities:
        _set_capabilities(trt, config, request.capabilities)

    started = time.monotonic()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.graph):
        raise _BuildError("operator", _parser_errors(parser))
    parsed = time.monotonic()

    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, ranges in shapes.items():
            profile.set_shape(name, *ranges)
        config.add_optimization_profile(profile)
    config.progress_monitor = _monitor(trt, send)
    if request.timing_cache is not None:
        load_timing_cache(config, Path(request.timing_cache))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _BuildError("build", "; ".join(logger.errors[-3:]) or "TensorRT gave no reason")
    if request.timing_cache is not None:
        save_timing_cache(config, Path(request.timing_cache))
    built = time.monotonic()
    content = memoryview(plan)
    Path(request.plan).write_bytes(content)
    return Built(
        version=str(trt.__version__),
        parse_s=parsed - started,
        build_s=built - parsed,
        peak_rss_bytes=_peak_rss_bytes(),
        plan_bytes=content.nbytes,
        **_describe(network),
    )


def _set_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    if not hasattr(trt, "ComputeCapability"):
        raise _BuildError("capability", "other GPUs than the local one")
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        name = "SM" + capability.replace(".", "")
        if name not in known or not config.set_compute_capability(known[name], i):
            numbers = sorted(int(n[2:]) for n in known if n.startswith("SM"))
            choice = ", ".join(f"{n // 10}.{n % 10}" for n in numbers)
            raise _BuildError("capability", f"{capability}; it supports {choice}")


def _peak_rss_bytes() -> int:
    # getrusage would count the memory of the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _parser_errors(parser: Any) -> str:
    found = []
    for i in range(min(parser.num_errors, 3)):
        error = parser.get_error(i)
        found.append(f"{error.node_operator()} ({error.node_name()}): {error.desc()}")
    return "; ".join(found)


def _describe(network: Any) -> dict[str, Any]:
    layers: Counter[str] = Counter()
    computes: Counter[str] = Counter()
    plugins = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        layers[kind] += 1
        if kind in ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"):
            computes[layer.get_output(0).dtype.name] += 1
        if kind == "PLUGIN_V3":
            inputs = (layer.get_input(k).dtype.name for k in range(layer.num_inputs))
            plugins[layer.name] = tuple(inputs)
    ends = [network.get_input(i) for i in range(network.num_inputs)]
    ends += [network.get_output(i) for i in range(network.num_outputs)]
    tensors = {tensor.name: tensor.dtype.name for tensor in ends}
    return {"layers": layers, "tensors": tensors, "computes_in": computes, "plugins": plugins}


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
                sys.stderr.write(message + "\n")

    return Logger()


def _monitor(trt: Any, send: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            del parent
            self.totals[phase] = steps
            send(Progress(phase, 0, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            send(Progress(phase, step + 1, self.totals.get(phase, step + 1)))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self.totals.pop(phase, 1)
            send(Progress(phase, steps, steps))

    return Monitor()


if __name__ == "__main__":
    main()
