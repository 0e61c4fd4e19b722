"""Load a bundle into an engine, and run it on single images."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.engine import Engine, Mode
from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances

if TYPE_CHECKING:
    from PIL import Image

_logger = logging.getLogger(__name__)

ENGINES = ("auto", "openvino", "onnxruntime", "tensorrt")


def load_engine(
    bundle: Bundle | str | Path = "default",
    engine: str = "auto",
    mode: Mode = "latency",
    *,
    pose: bool = False,
    spin: bool = False,
) -> Engine:
    """Load a bundle into the engine that runs it.

    Args:
        bundle: a bundle, its folder, or "default" for the one that comes with the package.
        engine: "auto" takes the backend that the bundle was built for; if that is TensorRT and it
            cannot run here, OpenVINO runs the bundle's portable graphs and the log says why
            (``tensorrt_unavailable``).
            "openvino" and "onnxruntime" run the portable graphs of any bundle on the CPU.
            "tensorrt" needs a bundle that was built for it.
        mode: what OpenVINO optimises for, see ``OpenVinoEngine``; the others ignore it.
        pose: load the bundle's poser too, so that the engine can ``estimate_pose``.
        spin: let TensorRT's engine wait for the GPU in a busy loop, see ``TensorRTEngine``; the
            others ignore it.

    Raises:
        InputError: there is no such bundle or engine, the engine cannot run the bundle, or the
            bundle has no poser and ``pose`` is set.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    if pose and bundle.poser is None:
        raise InputError(
            f"{bundle.path}: this model finds no keypoints; run it without pose, or use a bundle "
            "whose manifest has keypoints"
        )
    backend = bundle.manifest.backend
    if engine == "tensorrt" and not backend.startswith("tensorrt"):
        raise InputError(
            f"{bundle.path}: built for {backend}; build it again with --backend tensorrt, "
            "or run it with --engine auto"
        )
    chosen = backend if engine == "auto" else engine
    if chosen.startswith("tensorrt"):
        from maskcast.engines.tensorrt.plan import unavailable_reason

        reason = unavailable_reason(bundle)
        if reason is None:
            from maskcast.engines.tensorrt.engine import TensorRTEngine

            return TensorRTEngine(bundle, spin=spin, pose=pose)
        if engine == "tensorrt":
            raise InputError(
                f"{bundle.path}: TensorRT cannot run it ({reason}); run it with --engine auto"
            )
        fields = {"bundle": str(bundle.path), "reason": reason}
        _logger.warning("tensorrt_unavailable", extra={"fields": fields})
    if chosen == "onnxruntime":
        from maskcast.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, pose=pose)
    from maskcast.engines.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(bundle, mode, pose=pose)


def predict(
    image: str | Path | NDArray[np.uint8] | Image.Image,
    model: Engine | Bundle | str | Path = "default",
    min_score: float | None = None,
    *,
    pose: bool = False,
) -> Instances:
    """Find the instances in one image.

    For many images, load an engine once and pass it::

        engine = maskcast.load_engine("bundle")
        found = maskcast.predict("photo.jpg", engine)

    Args:
        image: a file, an array ``[height, width, 3]`` uint8 RGB, or a Pillow image. Files and
            Pillow images are turned upright as their EXIF orientation says.
        model: an engine from ``load_engine``, or a bundle, its folder, or "default". The engine
            of the bundle used last is kept for the next call; such calls wait for each other.
        min_score: minimum score, 0..1; the bundle's own threshold by default.
        pose: estimate keypoints. An engine that was loaded with pose always does.

    Raises:
        InputError: there is no such file or bundle, it cannot be read, or the bundle has no poser
            and ``pose`` is set.
        ValueError: the array has the wrong shape or dtype, ``min_score`` is not in 0..1, or the
            engine was loaded without pose and ``pose`` is set.
        TypeError: an argument has the wrong type.
        RuntimeError: the engine is closed.
    """
    rgb = _to_rgb(image)
    if min_score is not None and not 0 <= min_score <= 1:
        raise ValueError(f"min_score: expected 0..1, not {min_score}")
    if isinstance(model, Engine):
        if pose and not model.has_pose:
            raise ValueError("pose: the engine was loaded without; use load_engine(..., pose=True)")
        return _predict(rgb, model, min_score)
    if not isinstance(model, str | Path | Bundle):
        raise TypeError(
            f"model: expected an engine, or a bundle's name or folder, not {_kind(model)}"
        )
    with _kept_engine.lock:
        return _predict(rgb, _kept_engine.get(model, pose=pose), min_score)


def _predict(rgb: NDArray[np.uint8], engine: Engine, min_score: float | None) -> Instances:
    manifest = engine.manifest
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    fitted = engine.fit(frame, 0)
    threshold = manifest.score_threshold if min_score is None else min_score
    (instances,) = engine.run([fitted], threshold)
    return instances


class _KeptEngine:
    """The engine of the bundle that ``predict`` used last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._bundle: Bundle | None = None
        self._engine: Engine | None = None

    def get(self, model: Bundle | str | Path, *, pose: bool) -> Engine:
        """Return the engine of a bundle, with or without its poser; the lock must be held."""
        # Opening reads the manifest again: a bundle that was rebuilt is loaded again.
        bundle = model if isinstance(model, Bundle) else open_bundle(model)
        if self._engine is None or bundle != self._bundle or pose != self._engine.has_pose:
            if self._engine is not None:
                self._engine.close()
            self._engine = None
            self._engine = load_engine(bundle, pose=pose)
            self._bundle = bundle
        return self._engine


_kept_engine = _KeptEngine()


def _to_rgb(image: object) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    from maskcast.engines.image_file import read_image

    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, Engine):
        raise TypeError("image: got an engine; the image comes first: predict(image, engine)")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a path, an array or a Pillow image, not {_kind(image)}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"image: expected [height, width, 3] uint8, not {list(image.shape)} {image.dtype}"
        )
    return image


def _kind(value: object) -> str:
    return type(value).__name__
