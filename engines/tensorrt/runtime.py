"""TensorRT's runtime: its log, execution contexts, and the cache of TensorRT-RTX's kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskcast.engines.user_cache import write_atomically

_logger = logging.getLogger("maskcast.engines.tensorrt.engine")
_runtimes: dict[str, Any] = {}


class RuntimeCache:
    """A file with the kernels that TensorRT-RTX compiled, so that it compiles them only once.

    TensorRT-RTX checks that the content matches the GPU, the driver and its own version, and
    ignores it otherwise.

    Args:
        config: an ``IRuntimeConfig``, which receives the cache.
        path: the file; it may be absent.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._config = path, config
        self._raw = config.create_runtime_cache()
        self._saved = b""
        with suppress(OSError):
            content = path.read_bytes()
            if self._raw.deserialize(content):
                self._saved = content
        config.set_runtime_cache(self._raw)

    def save(self) -> None:
        """Write what has been compiled since. It is not an error if the file cannot be written."""
        content = bytes(memoryview(self._raw.serialize()))
        if content == self._saved:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, content)
            self._saved = content
        except OSError as error:
            fields = {"file": str(self._path), "reason": str(error)}
            _logger.info("runtime_cache_not_written", extra={"fields": fields})


def make_contexts(trt: Any, engine: Any, cache_file: Path) -> tuple[list[Any], RuntimeCache | None]:
    """Make an execution context on each of an engine's optimisation profiles.

    A context for which the GPU has too little memory is None. Wait for the GPU before a context is
    used on a stream, because its profile is set on the default stream.

    TensorRT compiled its kernels when it built the plan. TensorRT-RTX compiles at run time, by
    default in the background for each new shape, and runs slower kernels until then. The engine
    uses few shapes and runs each of them when it starts, so they are compiled there, once, and kept
    in a file. The engine captures CUDA graphs itself, for both packages.
    """
    # Each context gets the memory of its own profile, not of the largest.
    how = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    cache: RuntimeCache | None = None
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        config.set_execution_context_allocation_strategy(how)
        cache, how = RuntimeCache(config, cache_file), config
    contexts = []
    for profile in range(engine.num_optimization_profiles):
        context = engine.create_execution_context(how)
        if context is not None and not context.set_optimization_profile_async(profile, 0):
            context = None
        contexts.append(context)
    return contexts, cache


def runtime(trt: Any) -> Any:
    """Return a package's only runtime; it and its logger must outlive every engine."""
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
