"""A plan in memory: opened with the package that built it, checked against the machine, run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from maskcast.engines.bundle import Bundle, GraphFile
from maskcast.engines.errors import InputError
from maskcast.engines.plan import Plan, incompatibility, rebuild_command
from maskcast.engines.tensorrt.plugins.library import (
    PLUGINS,
    compute_capability,
    driver_too_old,
    register,
)
from maskcast.engines.tensorrt.runtime import make_context, runtime

_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}
CACHE = "runtime_cache"
"""Folder in a bundle for what TensorRT-RTX compiles on this machine; not part of the bundle."""

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


class DeviceError(RuntimeError):
    """The GPU failed during work. Its context is lost: start the program again."""


class LoadedPlan:
    """An engine of TensorRT with one execution context; for one thread at a time.

    Args:
        engine: TensorRT's ``ICudaEngine``.
        context: an ``IExecutionContext`` of it.
        name: of the graph, "detector", "segmenter" or "poser".
        on_warm: called once the context has run with every shape that it will get.
    """

    def __init__(
        self, engine: Any, context: Any, name: str, on_warm: Callable[[], None] | None = None
    ) -> None:
        self._engine, self._context, self._name = engine, context, name
        self.on_warm = on_warm or _nothing
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.outputs = tuple(n for n in names if engine.get_tensor_mode(n).name == "OUTPUT")

    def shape(self, name: str, first: int) -> tuple[int, ...]:
        """Return a tensor's shape with a value for its dynamic first dimension."""
        return (first, *(int(side) for side in tuple(self._engine.get_tensor_shape(name))[1:]))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return a tensor's element type."""
        return np.dtype(_TYPES[self._engine.get_tensor_dtype(name).name])

    def capturable(self, stream: int) -> bool:
        """Tell whether a run with the shapes of the last one can be captured into a CUDA graph."""
        # TensorRT-RTX cannot while it has kernels to compile; TensorRT always can.
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def close(self) -> None:
        """Let TensorRT free what it holds on the GPU; the CUDA context must be current."""
        self.on_warm = _nothing
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


def open_plans(
    bundle: Bundle, capability: tuple[int, int], names: Sequence[str]
) -> Iterator[LoadedPlan]:
    """Open the plans of some of a bundle's graphs, in their order. A CUDA context must be current.

    Args:
        bundle: has these graphs.
        capability: of the GPU.
        names: "detector", "segmenter" and "poser".

    Raises:
        InputError: a plan does not fit the package, the GPU, the graph or the plugins here; the
            message says how to build it again.
    """
    plans = {plan.graph: plan for plan in bundle.manifest.plans}
    for name in names:
        graph: GraphFile = getattr(bundle.manifest.graphs, name)
        if name not in plans:
            raise InputError(
                f"{bundle.path}: has no TensorRT plan of the {name}; build one with "
                f"`maskcast build {bundle.path} --backend tensorrt --out {bundle.path}`"
            )
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
        register(trt)
        engine = runtime(trt).deserialize_cuda_engine((bundle.path / plan.file).read_bytes())
        if engine is not None:
            cache_file = bundle.path / CACHE / f"{plan.graph}.{capability[0]}.{capability[1]}"
            context, cache = make_context(trt, engine, cache_file)
            if context is not None:
                return LoadedPlan(engine, context, plan.graph, cache.save if cache else None)
            needed_mb = engine.device_memory_size_v2 / 1e6
            raise InputError(
                f"{bundle.path / plan.file}: the GPU could not give the {needed_mb:.0f} MB that it "
                "works in; close other programs, or build it with a smaller --size or --batch"
            )
        reason = f"{plan.package} does not load it; its log says why"
    again = rebuild_command(bundle.manifest.plans, str(bundle.path), capability)
    raise InputError(
        f"{bundle.path / plan.file} cannot run here: {reason}; build it again: `{again}`"
    )


def _nothing() -> None:
    """Save nothing: TensorRT compiles nothing at run time."""
