"""Bundle: a folder with a model that is ready to run, and the manifest that describes it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import HEATMAP_SIZE, Keypoints
from maskcast.engines.onnx_file import GraphPorts, check_graph
from maskcast.engines.plan import (
    FileName,
    GraphName,
    Plan,
    Precision,
    Sha256,
    ShortText,
    Side,
)

FORMAT = 1
"""The version of the manifest that is written and read here."""

MANIFEST = "manifest.json"
DEFAULT = "default"
"""The name of the bundle that comes with the package."""

Backend = Literal["openvino", "onnxruntime", "tensorrt", "tensorrt_rtx"]

PadValue = Annotated[int, Meta(ge=0, le=255)]

_EMBEDDED = Path(__file__).parent / "bundles"
_STRIDE = 32
_SMALLEST_SIDE = 64
_LARGEST_MANIFEST = 1 << 20
_BOXES = frozenset({"p2", "p3", "p4", "p5", "boxes", "batch_index"})
# Enough to tell the graphs apart; the engines use more outputs.
_PORTS: dict[GraphName, GraphPorts] = {
    "detector": GraphPorts(frozenset({"images", "sizes"}), frozenset({"p2"})),
    "segmenter": GraphPorts(_BOXES | {"labels"}, frozenset({"masks"})),
    "poser": GraphPorts(_BOXES, frozenset({"heatmaps"})),
}


class FixedInput(msgspec.Struct, frozen=True, tag="fixed", tag_field="kind"):
    """One input shape for all images; the rest of the shape is padded.

    Attributes:
        height, width: multiples of 32, from 64.
        pad_value: 0..255, of every channel.
    """

    height: Side
    width: Side
    pad_value: PadValue = 0

    def shape(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of the input for an image of this size, and of its content."""
        scale = min(self.height / height, self.width / width)
        content = (
            min(max(round(height * scale), 1), self.height),
            min(max(round(width * scale), 1), self.width),
        )
        return (self.height, self.width), content


class LongestSideInput(msgspec.Struct, frozen=True, tag="longest_side", tag_field="kind"):
    """An input shape that follows the image's aspect ratio, with little padding.

    Attributes:
        longest_side: of the resized image, pixels; a multiple of 32, from 64. Each side of the
            input is that of the image, rounded up to a multiple of 32.
        pad_value: 0..255, of every channel.
    """

    longest_side: Side
    pad_value: PadValue = 0

    def shape(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of the input for an image of this size, and of its content."""
        scale = self.longest_side / max(height, width)
        content = max(round(height * scale), 1), max(round(width * scale), 1)
        rounded = (max(-(-side // _STRIDE) * _STRIDE, _SMALLEST_SIDE) for side in content)
        return (next(rounded), next(rounded)), content


Input = FixedInput | LongestSideInput


class GraphFile(msgspec.Struct, frozen=True):
    """A file of the bundle, and the SHA-256 of its bytes in hexadecimal."""

    file: FileName
    sha256: Sha256


class Graphs(msgspec.Struct, frozen=True):
    """The portable graphs, ONNX.

    Attributes:
        detector: images to boxes and features.
        segmenter: features and boxes to mask crops; None for a Faster R-CNN.
        poser: features and boxes to heatmaps, float32 ``[R, K, 56, 56]``; None without keypoints.
    """

    detector: GraphFile
    segmenter: GraphFile | None = None
    poser: GraphFile | None = None

    @property
    def present(self) -> dict[GraphName, GraphFile]:
        """The graphs that the bundle has, by name, the detector first."""
        graphs: dict[GraphName, GraphFile | None] = {
            "detector": self.detector,
            "segmenter": self.segmenter,
            "poser": self.poser,
        }
        return {name: graph for name, graph in graphs.items() if graph is not None}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is: the JSON of its ``manifest.json``.

    Attributes:
        format: version of this description.
        name: of the model, for display.
        backend: the one that it was built for.
        precision: what the bundle's backend computes in: "fp32", "bf16", "fp16" or "int8".
        labels: class names by label; the first is "background". At most 10,000.
        input: shape of the network's input.
        score_threshold: minimum score by default.
        graphs: the portable graphs.
        keypoints: what the poser finds; None without a poser.
        keypoint_blur_cells: standard deviation, in cells, of the filter that heatmaps pass before
            their largest value is taken; 0 for torchvision's positions. See ``decode_heatmaps``.
        plans: TensorRT plans of the graphs; empty for other backends.
        built_with: versions of the packages that built it.
    """

    format: int = FORMAT
    name: ShortText
    backend: Backend
    precision: Precision
    labels: Annotated[tuple[ShortText, ...], Meta(min_length=1, max_length=10_000)]
    input: Input
    score_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    graphs: Graphs
    keypoints: Keypoints | None = None
    keypoint_blur_cells: Annotated[float, Meta(ge=0, le=HEATMAP_SIZE)] = 0.0
    plans: Annotated[tuple[Plan, ...], Meta(max_length=16)] = ()
    built_with: Annotated[dict[ShortText, ShortText], Meta(max_length=100)] = {}

    def __post_init__(self) -> None:
        if (self.keypoints is None) != (self.graphs.poser is None):
            raise ValueError("keypoints need a poser and a poser needs keypoints; one is missing")


class Bundle(msgspec.Struct, frozen=True):
    """A bundle on disk whose files have been checked.

    Attributes:
        path: its folder.
        manifest: what it is.
    """

    path: Path
    manifest: Manifest

    @property
    def detector(self) -> Path:
        """The detector's ONNX file."""
        return self.path / self.manifest.graphs.detector.file

    @property
    def segmenter(self) -> Path | None:
        """The segmenter's ONNX file; None for a Faster R-CNN."""
        graph = self.manifest.graphs.segmenter
        return None if graph is None else self.path / graph.file

    @property
    def poser(self) -> Path | None:
        """The poser's ONNX file; None for a model without keypoints."""
        graph = self.manifest.graphs.poser
        return None if graph is None else self.path / graph.file


def default_bundle() -> Path:
    """Find the folder of the bundle that comes with the package."""
    return _EMBEDDED / DEFAULT


def open_bundle(name_or_path: str | Path) -> Bundle:
    """Open a bundle and check that its files are complete and undamaged.

    Args:
        name_or_path: a bundle's folder, or "default" for the one that comes with the package.

    Raises:
        InputError: there is no bundle, it is damaged, or its format is not ``FORMAT``.
    """
    path = default_bundle() if str(name_or_path) == DEFAULT else Path(name_or_path)
    manifest = read_manifest(path)
    for name, graph in manifest.graphs.present.items():
        _check(path / graph.file, graph.sha256)
        check_graph(path / graph.file, _PORTS[name])
    for plan in manifest.plans:
        _check(path / plan.file, plan.sha256)
    return Bundle(path, manifest)


def is_bundle(name_or_path: str | Path) -> bool:
    """Return whether a model is a bundle's folder or "default", and not a checkpoint."""
    return str(name_or_path) == DEFAULT or (Path(name_or_path) / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle in a folder.

    Raises:
        InputError: there is no manifest, it is damaged, or its format is not ``FORMAT``.
    """
    file = path / MANIFEST
    try:
        with _open_regular(file) as opened:
            content = opened.read(_LARGEST_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        reason = f"holds no {MANIFEST}" if path.is_dir() else "no such folder"
        if path.is_file():
            raise InputError(f"{path}: a file, not a bundle; give the bundle's folder") from None
        raise InputError(
            f"{path}: not a bundle ({reason}); build one with `maskcast build`"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); build it again") from None
    if len(content) > _LARGEST_MANIFEST:
        raise InputError(f"{file}: larger than {_LARGEST_MANIFEST >> 20} MiB; build it again")
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise InputError(
                f"{path}: a bundle of format {version}, but this maskcast reads format {FORMAT}; "
                "build it again"
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise InputError(f"{file}: damaged ({reason}); build it again") from None


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Version(msgspec.Struct):
    format: int


def _open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file: no link, which may lead out of the bundle, and no device or FIFO.

    Raises:
        OSError: the file is not regular, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _check(path: Path, expected: str) -> None:
    try:
        with _open_regular(path) as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = "a link" if path.is_symlink() else error.strerror
        raise InputError(f"{path}: cannot be read ({reason}); build the bundle again") from None
    if actual != expected:
        raise InputError(f"{path}: damaged, its checksum differs; build the bundle again")
