"""From a bundle to an engine."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.engine import Engine, Mode
from maskcast.engines.errors import InputError
from maskcast.engines.image import fit_image
from maskcast.engines.instances import Instances

_logger = logging.getLogger(__name__)

ENGINES = ("auto", "openvino", "onnxruntime", "tensorrt")


def load_engine(
    bundle: Bundle | str | Path = "default", engine: str = "auto", mode: Mode = "latency"
) -> Engine:
    """Load a bundle into the engine that runs it.

    Args:
        bundle: a bundle, its folder, or "default" for the one that comes with the package.
        engine: "auto" takes the backend that the bundle was built for; where that is TensorRT and
            there is no GPU, OpenVINO takes its place, and the log says so. "openvino" and
            "onnxruntime" run the portable graphs of any bundle on the CPU. "tensorrt" needs a
            bundle that was built for it.
        mode: what OpenVINO is to be best at; the others take as many pictures at once as there
            are.

    Raises:
        InputError: there is no such bundle or engine, or the one cannot run the other.
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    backend = bundle.manifest.backend
    if engine == "tensorrt" and not backend.startswith("tensorrt"):
        raise InputError(
            f"{bundle.path}: built for {backend}; build it again with --backend tensorrt, "
            "or run it with --engine auto"
        )
    chosen = backend if engine == "auto" else engine
    if chosen.startswith("tensorrt"):
        from maskcast.engines.tensorrt.plan import why_not

        reason = why_not(bundle)
        if reason is None:
            from maskcast.engines.tensorrt.engine import TensorRTEngine

            return TensorRTEngine(bundle)
        if engine == "tensorrt":
            raise InputError(f"{bundle.path}: TensorRT cannot run it: {reason}")
        _logger.warning("%s: OpenVINO runs it on the CPU, since %s", bundle.path, reason)
    if chosen == "onnxruntime":
        from maskcast.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle)
    from maskcast.engines.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(bundle, mode)


def predict(engine: Engine, rgb: NDArray[np.uint8], min_score: float | None = None) -> Instances:
    """Find the instances in one picture.

    Args:
        engine: from ``load_engine``.
        rgb: ``[height, width, 3]`` uint8.
        min_score: what scores less is left out; the bundle's own threshold by default.

    Raises:
        ValueError: the array is of another shape or type.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.size == 0:
        raise ValueError(f"a picture is [height, width, 3] uint8, not {rgb.shape} {rgb.dtype}")
    manifest = engine.manifest
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    image = fit_image(frame, 0, manifest.input)
    threshold = manifest.score_threshold if min_score is None else min_score
    (instances,) = engine.segment(engine.detect([image], threshold))
    return instances
