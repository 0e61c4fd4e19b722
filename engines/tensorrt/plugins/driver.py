"""Load the compiled kernels and launch them on any stream, through the CUDA driver itself.

pycuda owns streams, events and memory in the engine, but it can launch only on streams that it
made; TensorRT hands ``enqueue`` a raw stream handle, its own auxiliary streams included. So these
few calls go to ``libcuda`` directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Lock

from maskcast.engines.tensorrt.plugins.launch import Launch

IMAGE = Path(__file__).with_name("kernels.fatbin")

OLDEST_DRIVER = (13, 0)
"""The CUDA that a driver must be for: that of the compiler that made the kernels."""

_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0
_KERNELS = (
    "multiscale_roi_align_f32",
    "multiscale_roi_align_f16",
    "nms_rank",
    "nms_overlap",
    "nms_select",
    "preprocess_f32",
    "preprocess_f16",
)


class CudaError(RuntimeError):
    """The CUDA driver refused a call."""


class Kernels:
    """The compiled kernels in one CUDA context.

    Safe to use from several threads and for several execution contexts at once: after loading
    nothing changes but a table of functions, filled while loading.
    """

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver = driver
        self._image = IMAGE.read_bytes()
        self._module = ctypes.c_void_p()
        _check(driver, driver.cuModuleLoadData(ctypes.byref(self._module), self._image))
        self._functions = {name: self._find(name) for name in _KERNELS}

    def launch(self, launches: Iterable[Launch], stream: int) -> None:
        """Put launches on a stream, in order. Neither allocates on the device nor waits for it."""
        for task in launches:
            size = ctypes.c_size_t(ctypes.sizeof(task.arguments))
            extra = (ctypes.c_void_p * 5)(
                _BUFFER_POINTER,
                ctypes.addressof(task.arguments),
                _BUFFER_SIZE,
                ctypes.addressof(size),
                _END,
            )
            status = self._driver.cuLaunchKernel(
                self._functions[task.kernel], *task.grid, *task.block, 0,
                ctypes.c_void_p(stream), None, extra,
            )  # fmt: skip
            _check(self._driver, status)

    def _find(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        status = self._driver.cuModuleGetFunction(
            ctypes.byref(function), self._module, name.encode()
        )
        _check(self._driver, status)
        return function


_loaded: dict[int, Kernels] = {}
_loading = Lock()


def kernels() -> Kernels:
    """Give the kernels of the calling thread's current CUDA context; load them at the first call.

    Raises:
        CudaError: no context is current, or the driver refuses the binary.
    """
    driver = _driver()
    context = ctypes.c_void_p()
    _check(driver, driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        raise CudaError("no CUDA context is current on this thread")
    # The id, unlike the handle, is never given to a later context.
    identity = ctypes.c_ulonglong()
    _check(driver, driver.cuCtxGetId(context, ctypes.byref(identity)))
    with _loading:
        if identity.value not in _loaded:
            _loaded[identity.value] = Kernels(driver)
        return _loaded[identity.value]


def compute_capability(device: int = 0) -> tuple[int, int] | None:
    """Compute capability of a GPU; None where there is no driver or no such GPU."""
    try:
        driver = _driver()
    except OSError:
        return None
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major_attribute, minor_attribute = 75, 76
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, handle)
    ):
        return None
    return major.value, minor.value


def driver_too_old() -> str | None:
    """Say why the driver cannot load the kernels; None where it can, or there is none."""
    version = ctypes.c_int()
    try:
        if _driver().cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    cuda = version.value // 1000, version.value % 1000 // 10
    if cuda >= OLDEST_DRIVER:
        return None
    return (
        f"the NVIDIA driver is for CUDA {cuda[0]}.{cuda[1]}, and maskcast's kernels need "
        f"{OLDEST_DRIVER[0]}.{OLDEST_DRIVER[1]}: install a driver of the 580 series or later"
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    reason = text.value.decode() if text.value else "unknown error"
    raise CudaError(f"CUDA driver: {reason} (status {status})")
