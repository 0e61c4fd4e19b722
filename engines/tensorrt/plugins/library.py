"""The native library: plugins that TensorRT loads, and their kernels as functions.

``python -m maskcast.engines.tensorrt.plugins.library`` prints its path, for trtexec and Triton.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from maskcast.engines.errors import InputError
from maskcast.engines.planes import Planes

NAMESPACE = "maskcast"
PLUGINS = {"MultiscaleRoiAlign": "1", "GroupedNms": "1"}
"""Names and versions of the plugins in the library; a plan records them."""

NAME = "libmaskcast_plugins.so"
FOLDER = Path(__file__).parent

OLDEST_DRIVER = (13, 0)
"""CUDA version that the driver must support at least: that of the kernels' compiler."""

_registered: dict[str, Any] = {}
_registering = Lock()

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "maskcast_load": (_INT, ()),
    "maskcast_error": (ctypes.c_char_p, (_INT,)),
    "maskcast_roi_align": (_INT, (*(_POINTER,) * 6, *(_INT,) * 7, _POINTER)),
    "maskcast_nms_workspace_bytes": (ctypes.c_uint64, (_INT, _INT)),
    "maskcast_grouped_nms": (_INT, (*(_POINTER,) * 5, *(_INT,) * 3, _FLOAT, _FLOAT, _POINTER)),
    "maskcast_preprocess": (_INT, (_POINTER, _INT, _POINTER, _INT, _POINTER)),
    "maskcast_preprocess_planes": (
        _INT,
        (_POINTER, _INT, _POINTER, _INT, _INT, _FLOAT, _POINTER),
    ),
    "maskcast_crops_to_bytes": (_INT, (_POINTER, _POINTER, _INT, _POINTER)),
}


class DevicePlanes(ctypes.Structure):
    """An image as a decoder gives it; see ``Planes`` in arguments.h."""

    _fields_ = (
        ("luma", _POINTER),
        ("u", _POINTER),
        ("v", _POINTER),
        ("height", _INT),
        ("width", _INT),
        ("step", _INT),
        ("turns", _INT),
        ("content_height", _INT),
        ("content_width", _INT),
        ("chroma_shift", _FLOAT),
        ("luma_offset", _FLOAT),
        ("luma_scale", _FLOAT),
        ("v_to_red", _FLOAT),
        ("u_to_green", _FLOAT),
        ("v_to_green", _FLOAT),
        ("u_to_blue", _FLOAT),
    )


def device_planes(planes: Planes, at: int, content: tuple[int, int]) -> DevicePlanes:
    """Describe an image whose planes are contiguous on the device, without padding.

    Args:
        planes: the image.
        at: address of the first plane.
        content: height and width of the upright image inside the network's input.
    """
    u = at + planes.arrays[0].size
    is_interleaved = len(planes.arrays) == 2
    return DevicePlanes(
        at,
        u,
        u + 1 if is_interleaved else u + planes.arrays[1].size,
        planes.height,
        planes.width,
        2 if is_interleaved else 1,
        planes.turns,
        *content,
        planes.chroma_shift,
        *planes.conversion,
    )


class CudaError(RuntimeError):
    """The CUDA driver refused a call."""


class Kernels:
    """The kernels as functions. Pointers and streams are integers, pointers are to device memory.

    Every function queues its work on a stream and returns at once, without allocating or waiting.
    It needs a current CUDA context. Several threads may call functions; the GIL is released.

    Args:
        path: of the library; by default the installed one.

    Raises:
        InputError: there is no library for this machine.
        CudaError: from the functions, when the CUDA driver refuses a call.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(path or library_path()))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def load(self) -> None:
        """Load the kernels into the current CUDA context, so that no later call has to."""
        self._check(self._library.maskcast_load())

    def preprocess(self, images: Sequence[int], inputs: int, pixels: int, stream: int) -> None:
        """Convert images, each ``[pixels, 3]`` uint8, to ``[images, 3, pixels]`` float32.

        ``pixels`` is a multiple of 4.
        """
        pointers = (ctypes.c_void_p * len(images))(*images)
        self._check(
            self._library.maskcast_preprocess(pointers, len(images), inputs, pixels, stream)
        )

    def preprocess_planes(
        self,
        images: Sequence[DevicePlanes],
        inputs: int,
        shape: tuple[int, int],
        pad_value: float,
        stream: int,
    ) -> None:
        """Resize and convert YUV images to ``[images, 3, height, width]`` float32, 0..255."""
        given = (DevicePlanes * len(images))(*images)
        self._check(
            self._library.maskcast_preprocess_planes(
                given, len(images), inputs, *shape, pad_value, stream
            )
        )

    def crops_to_bytes(self, masks: int, crops: int, values: int, stream: int) -> None:
        """Convert ``values`` float32 in 0..1 to uint8 in 0..255, rounded; a multiple of 4."""
        self._check(self._library.maskcast_crops_to_bytes(masks, crops, values, stream))

    def roi_align(
        self,
        features: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        rois: int,
        batch_index: int,
        pooled: int,
        *,
        images: int,
        boxes: int,
        channels: int,
        output_size: int,
        sampling_ratio: int,
        aligned: bool,
        half: bool,
        stream: int = 0,
    ) -> None:
        """Pool ``boxes`` boxes from the levels P2..P5; see multiscale_roi_align.cu.

        ``features`` are P2..P5, each ``[images, channels, height, width]`` with heights and widths
        in ``sizes``, float16 where ``half``, else float32; ``rois`` ``[boxes, 4]`` float32;
        ``batch_index`` ``[boxes]`` int32; ``pooled`` ``[boxes, channels, size, size]`` of the
        features' type is written.
        """
        self._check(
            self._library.maskcast_roi_align(
                (ctypes.c_void_p * 4)(*features),
                (ctypes.c_int32 * 4)(*(height for height, _ in sizes)),
                (ctypes.c_int32 * 4)(*(width for _, width in sizes)),
                rois,
                batch_index,
                pooled,
                images,
                boxes,
                channels,
                output_size,
                sampling_ratio,
                aligned,
                half,
                stream,
            )
        )

    def nms_workspace_bytes(self, images: int, candidates: int) -> int:
        """Return the size of the workspace of ``grouped_nms``, bytes."""
        return int(self._library.maskcast_nms_workspace_bytes(images, candidates))

    def grouped_nms(
        self,
        boxes: int,
        scores: int,
        groups: int,
        keep: int,
        workspace: int,
        *,
        images: int,
        candidates: int,
        max_output: int,
        iou_threshold: float,
        score_threshold: float,
        stream: int = 0,
    ) -> None:
        """Suppress overlapping boxes within groups; three launches. See grouped_nms.cu.

        ``boxes`` ``[images, candidates, 4]`` and ``scores`` ``[images, candidates]`` are float32,
        ``groups`` ``[images, candidates]`` int32; ``keep`` ``[images, max_output]`` int32 is
        written; ``workspace`` is aligned to 256. At most 8192 candidates.
        """
        self._check(
            self._library.maskcast_grouped_nms(
                boxes,
                scores,
                groups,
                keep,
                workspace,
                images,
                candidates,
                max_output,
                iou_threshold,
                score_threshold,
                stream,
            )
        )

    def _check(self, status: int) -> None:
        if status != 0:
            reason = self._library.maskcast_error(status).decode(errors="replace")
            raise CudaError(f"CUDA driver: {reason} (status {status})")


def library_path() -> Path:
    """Find the library for this machine's processor.

    Raises:
        InputError: there is none; the message says how to build it.
    """
    machine = platform.machine()
    path = FOLDER / "lib" / machine / NAME
    if not path.is_file():
        raise InputError(
            f"{path}: the TensorRT plugins are not built for {machine}; build them with "
            "`python -m maskcast.builder.tensorrt.plugin_library`"
        )
    return path


def register(trt: Any) -> None:
    """Make the plugins known to a package (``tensorrt``, ``tensorrt_rtx``, or the lean runtime).

    Raises:
        InputError: there is no library for this machine, or the package does not accept it.
    """
    with _registering:
        if trt.__name__ in _registered:
            return
        path, registry = library_path(), trt.get_plugin_registry()
        handle = registry.load_library(str(path))
        for name, version in PLUGINS.items():
            if registry.get_creator(name, version, NAMESPACE) is None:
                raise InputError(
                    f"{path}: {trt.__name__} {trt.__version__} cannot load the plugin {name}; "
                    "build the library again with the headers of that version"
                )
        _registered[trt.__name__] = handle


def compute_capability(device: int = 0) -> tuple[int, int] | None:
    """Return the compute capability of a GPU; None if there is no driver or no such GPU."""
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


def driver_incompatibility() -> str | None:
    """Return why the driver cannot load the kernels; None if it can, or there is no driver."""
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
        f"the NVIDIA driver supports CUDA {cuda[0]}.{cuda[1]}, and maskcast's kernels need "
        f"{OLDEST_DRIVER[0]}.{OLDEST_DRIVER[1]}: install a driver of the 580 series or later"
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


if __name__ == "__main__":
    sys.stdout.write(f"{library_path()}\n")
