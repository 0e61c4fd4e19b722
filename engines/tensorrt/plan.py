"""Plans: opened with the package that built them, checked against the machine, and run."""

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
    driver_incompatibility,
    register,
)
from maskcast.engines.tensorrt.runtime import make_contexts, runtime

_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}
CACHE = "runtime_cache"
"""Folder in a bundle for what TensorRT-RTX compiles on this machine; not part of the bundle."""

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


class DeviceError(RuntimeError):
    """The GPU failed during work. Its context is lost: restart the program."""


class Profile:
    """An execution context for one range of shapes, with the shapes and addresses set last.

    Args:
        engine: TensorRT's ``ICudaEngine``.
        context: an ``IExecutionContext`` of it, on the optimisation profile ``index``.
        index: which of the engine's optimisation profiles.
    """

    def __init__(self, engine: Any, context: Any, index: int) -> None:
        self.context: Any = context
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        for name in _names(engine, "INPUT"):
            least, _, most = map(tuple, engine.get_tensor_profile_shape(name, index))
            self._ranges[name] = int(least[0]), int(most[0])

    @property
    def size(self) -> int:
        """The sum of the inputs' largest first dimensions: the smaller, the more specialised."""
        return sum(most for _, most in self._ranges.values())

    def takes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether shapes are in the range."""
        ranges = self._ranges
        return all(ranges[n][0] <= shape[0] <= ranges[n][1] for n, shape in shapes.items())

    def give(self, run: Run) -> None:
        """Set the shapes and addresses of a run that differ from those set last."""
        for name, shape in run.shapes.items():
            if self._shapes.get(name) != shape:
                if not self.context.set_input_shape(name, shape):
                    raise DeviceError(f"the {run.name} does not accept {name} of shape {shape}")
                self._shapes[name] = shape
        for name, address in run.addresses.items():
            if self._addresses.get(name) != address:
                if not self.context.set_tensor_address(name, address):
                    raise DeviceError(f"the {run.name} has no tensor {name}")
                self._addresses[name] = address


class Run:
    """A network with its shapes and addresses, to be queued on a stream repeatedly.

    Attributes:
        name: of the graph.
        shapes: of the inputs, by name.
        addresses: of all tensors on the device, by name.
    """

    def __init__(
        self,
        name: str,
        profile: Profile,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
    ) -> None:
        self.name, self.shapes, self.addresses = name, shapes, addresses
        self._profile = profile

    def start(self, stream: int) -> None:
        """Queue the network on a stream.

        Raises:
            DeviceError: TensorRT or a plugin refuses; the log says why.
        """
        self._profile.give(self)
        if not self._profile.context.execute_async_v3(stream):
            raise DeviceError(f"the {self.name} could not be run; TensorRT's log says why")

    def capturable(self, stream: int) -> bool:
        """Return whether another run with these shapes can be captured in a CUDA graph."""
        # TensorRT-RTX cannot capture while it has kernels to compile; TensorRT always can.
        ask = getattr(self._profile.context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))


class LoadedPlan:
    """A TensorRT engine with its execution contexts; for one thread at a time.

    Args:
        engine: TensorRT's ``ICudaEngine``.
        contexts: an ``IExecutionContext`` on each of its optimisation profiles, in their order.
        name: of the graph, "detector", "segmenter" or "poser".
        on_warm: called once the contexts have run with every shape that they will get.
    """

    def __init__(
        self,
        engine: Any,
        contexts: Sequence[Any],
        name: str,
        on_warm: Callable[[], None] | None = None,
    ) -> None:
        self._engine, self._name = engine, name
        self.on_warm = on_warm or _nothing
        self.outputs = tuple(_names(engine, "OUTPUT"))
        profiles = (Profile(engine, context, i) for i, context in enumerate(contexts))
        self._profiles = sorted(profiles, key=lambda profile: profile.size)

    def shape(self, name: str, first: int) -> tuple[int, ...]:
        """Return a tensor's shape with a value for its dynamic first dimension."""
        return (first, *(int(side) for side in tuple(self._engine.get_tensor_shape(name))[1:]))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return a tensor's element type."""
        return np.dtype(_TYPES[self._engine.get_tensor_dtype(name).name])

    def close(self) -> None:
        """Let TensorRT free its GPU memory; the CUDA context must be current."""
        self.on_warm = _nothing
        for profile in self._profiles:
            profile.context = None
        self._engine = None

    def prepare(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> Run:
        """Return a run on the most specialised profile that takes the shapes.

        Args:
            shapes: of the inputs, by name.
            addresses: of all tensors on the device, by name.

        Raises:
            DeviceError: the plan was not built for these shapes.
        """
        for profile in self._profiles:
            if profile.takes(shapes):
                return Run(self._name, profile, shapes, addresses)
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DeviceError(f"the {self._name} was not built for {given}")


def _names(engine: Any, mode: str) -> list[str]:
    """Return the names of an engine's inputs or outputs."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name).name == mode]


def unavailable_reason(bundle: Bundle) -> str | None:
    """Return why a bundle's plans cannot run on this machine; None if they can be tried."""
    if not bundle.manifest.plans:
        return "the bundle has no TensorRT plan"
    package = bundle.manifest.plans[0].package
    for module, extra in ((package, _EXTRAS[package]), ("pycuda", _EXTRAS[package])):
        if find_spec(module) is None:
            return f"{module} is not installed (pip install 'maskcast[{extra}]')"
    if compute_capability() is None:
        return "no NVIDIA GPU or driver was found"
    return driver_incompatibility()


def open_plans(
    bundle: Bundle, capability: tuple[int, int], names: Sequence[str]
) -> Iterator[LoadedPlan]:
    """Open the plans of some of a bundle's graphs, in their order. A CUDA context must be current.

    Args:
        bundle: has these graphs.
        capability: of the GPU.
        names: "detector", "segmenter" and "poser".

    Raises:
        InputError: a plan does not match the package, the GPU, the graph or the plugins here; the
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
            contexts, cache = make_contexts(trt, engine, cache_file)
            if None not in contexts:
                return LoadedPlan(engine, contexts, plan.graph, cache.save if cache else None)
            needed_mb = engine.device_memory_size_v2 / 1e6
            raise InputError(
                f"{bundle.path / plan.file}: the GPU has too little memory, {needed_mb:.0f} MB are "
                "needed; close other programs, or build it with a smaller --size or --batch"
            )
        reason = f"{plan.package} cannot load it, and its log says why"
    again = rebuild_command(bundle.manifest.plans, str(bundle.path), capability)
    raise InputError(
        f"{bundle.path / plan.file} cannot run here: {reason}; build it again: `{again}`"
    )


def _nothing() -> None:
    """Do nothing: TensorRT compiles nothing at run time."""
