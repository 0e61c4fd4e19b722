"""A plan in memory: opened with the package that built it, checked against the machine, run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from maskcast.engines.bundle import Bundle
from maskcast.engines.errors import InputError
from maskcast.engines.plan import Plan, incompatibility, rebuild_command
from maskcast.engines.tensorrt.plugins.library import (
    PLUGINS,
    compute_capability,
    driver_too_old,
    register,
)

_logger = logging.getLogger("maskcast.engines.tensorrt.engine")
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


class DeviceError(RuntimeError):
    """The GPU failed in the middle of work. Its context is lost: start the program again."""


class LoadedPlan:
    """An engine of TensorRT with one execution context; for one thread at a time.

    Args:
        engine: TensorRT's ``ICudaEngine``.
        context: an ``IExecutionContext`` of it.
        name: for messages.
    """

    def __init__(self, engine: Any, context: Any, name: str) -> None:
        self._engine, self._context, self._name = engine, context, name
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.outputs = tuple(n for n in names if engine.get_tensor_mode(n).name == "OUTPUT")

    def shape(self, name: str, first: int) -> tuple[int, ...]:
        """Give a tensor's shape with its dynamic first dimension put in."""
        return (first, *(int(side) for side in tuple(self._engine.get_tensor_shape(name))[1:]))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Give a tensor's element type."""
        return np.dtype(_TYPES[self._engine.get_tensor_dtype(name).name])

    def close(self) -> None:
        """Let TensorRT free what it holds on the GPU; the CUDA context must be current."""
        self._context = None
        self._engine = None

    def run(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], stream: int
    ) -> None:
        """Put the network on a stream. ``shapes`` are the inputs', ``addresses`` all tensors'.

        Raises:
            DeviceError: TensorRT refuses, a plugin included; the log says why.
        """
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DeviceError(f"the {self._name} refuses {name} of shape {shape}")
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"the {self._name} knows no tensor {name}")
        if not self._context.execute_async_v3(stream):
            raise DeviceError(f"the {self._name} could not be run; TensorRT's log says why")


def why_not(bundle: Bundle) -> str | None:
    """Say why a bundle's plans cannot run on this machine at all; None where they can be tried."""
    if not bundle.manifest.plans:
        return "the bundle has no TensorRT plan"
    package = bundle.manifest.plans[0].package
    for module, extra in ((package, _EXTRAS[package]), ("pycuda", _EXTRAS[package])):
        if find_spec(module) is None:
            return f"{module} is not installed (pip install 'maskcast[{extra}]')"
    if compute_capability() is None:
        return "there is no NVIDIA GPU or no driver"
    return driver_too_old()


def open_plans(bundle: Bundle, capability: tuple[int, int]) -> Iterator[LoadedPlan]:
    """Open a bundle's plans, the detector first. A CUDA context must be current.

    Raises:
        InputError: a plan does not fit the package, the GPU, the graph or the plugins here; the
            message says how to build it again.
    """
    plans = {plan.graph: plan for plan in bundle.manifest.plans}
    if "detector" not in plans:
        raise InputError(
            f"{bundle.path}: has no TensorRT plan; build one with "
            f"`maskcast build {bundle.path} --backend tensorrt --out {bundle.path}`"
        )
    graphs = bundle.manifest.graphs
    order: tuple[tuple[Literal["detector", "segmenter"], Any], ...] = (
        ("detector", graphs.detector),
        ("segmenter", graphs.segmenter),
    )
    for name, graph in order:
        if graph is not None:
            yield _open(bundle, plans[name], graph.sha256, capability)


def _open(bundle: Bundle, plan: Plan, graph_sha256: str, capability: tuple[int, int]) -> LoadedPlan:
    try:
        trt = import_module(plan.package)
    except (ImportError, OSError) as error:
        extra = _EXTRAS[plan.package]
        raise InputError(
            f"{plan.package} cannot be imported: pip install 'maskcast[{extra}]' ({error})"
        ) from None
    reason = incompatibility(
        plan,
        version=str(trt.__version__),
        capability=capability,
        graph_sha256=graph_sha256,
        plugins=PLUGINS,
    )
    if reason is None:
        engine, context = _deserialise(trt, (bundle.path / plan.file).read_bytes())
        if context is not None:
            return LoadedPlan(engine, context, plan.graph)
        if engine is not None:
            needed_mb = engine.device_memory_size_v2 / 1e6
            raise InputError(
                f"{bundle.path / plan.file}: the GPU could not give the {needed_mb:.0f} MB that it "
                "works in; close other programs, or build it with a smaller --size or --batch"
            )
        reason = f"{plan.package} refuses it, see the log"
    again = rebuild_command(bundle.manifest.plans, str(bundle.path), capability)
    raise InputError(
        f"{bundle.path / plan.file} cannot run here: {reason}; build it again: `{again}`"
    )


def _deserialise(trt: Any, content: bytes) -> tuple[Any, Any]:
    register(trt)
    engine = _runtime(trt).deserialize_cuda_engine(content)
    return engine, engine and engine.create_execution_context()


_runtimes: dict[str, Any] = {}


def _runtime(trt: Any) -> Any:
    """Give a package's one runtime: it and its logger must outlive every engine."""
    if trt.__name__ not in _runtimes:

        class Logger(trt.ILogger):  # type: ignore[misc]
            levels: Mapping[Any, int] = {
                trt.ILogger.INTERNAL_ERROR: logging.ERROR,
                trt.ILogger.ERROR: logging.ERROR,
                trt.ILogger.WARNING: logging.WARNING,
                trt.ILogger.INFO: logging.DEBUG,
            }

            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in self.levels:
                    _logger.log(self.levels[severity], message)

        logger = Logger()
        _runtimes[trt.__name__] = (trt.Runtime(logger), logger)
    return _runtimes[trt.__name__][0]
