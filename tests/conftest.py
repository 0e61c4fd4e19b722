"""What tests of several rooms share: clips made on the spot, and real servers to read them from."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engines.bundle import Bundle, GraphFile, Graphs, LongestSideInput, Manifest
from engines.engine import Detections, Engine
from engines.image import NetworkImage
from engines.instances import Instances

SYSTEM_PYTHON = "/usr/bin/python3"
_HAS_RTSP = (
    "import gi; gi.require_version('GstRtspServer', '1.0');"
    "from gi.repository import Gst, GstRtspServer; Gst.init(None);"
    "assert Gst.ElementFactory.find('x264enc')"
)

ClipMaker = Callable[..., Path]


def numbered_picture(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """A picture whose grey level tells its index (below 64), even after lossy coding."""
    return np.full((height, width, 3), 2 + 4 * index % 256, np.uint8)


@pytest.fixture
def make_clip(tmp_path: Path) -> ClipMaker:
    """Make a video file: ``make_clip("a.mp4", frames=10, width=64, ...) -> Path``."""

    def make(
        name: str = "clip.mp4",
        *,
        frames: int = 10,
        width: int = 64,
        height: int = 48,
        fps: int = 10,
        codec: str = "libx264",
        pix_fmt: str = "yuv420p",
        rotation: int = 0,
        draw: Callable[[int, int, int], NDArray[np.uint8]] = numbered_picture,
        **options: str,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if rotation:
                stream.set_display_rotation(rotation)
            container.start_encoding()
            for index in range(frames):
                rgb = draw(index, width, height)
                picture = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pix_fmt)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RtspServer:
    """A camera that can be switched off and on: a GStreamer RTSP server in its own process."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"rtsp://127.0.0.1:{port}/cam"
        self._process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        script = Path(__file__).with_name("rtsp_server.py")
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(script), "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _why_no_rtsp() -> str:
    if not Path(SYSTEM_PYTHON).exists():
        return f"there is no {SYSTEM_PYTHON}"
    probe = subprocess.run([SYSTEM_PYTHON, "-c", _HAS_RTSP], capture_output=True, text=True)
    return "" if probe.returncode == 0 else "GStreamer's RTSP server is not installed"


@pytest.fixture
def rtsp_server(free_port: int) -> Iterator[RtspServer]:
    """An RTSP server on this machine, not yet started; skips where GStreamer is absent."""
    if reason := _why_no_rtsp():
        pytest.skip(reason)
    server = RtspServer(free_port)
    yield server
    server.stop()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def http_server(tmp_path: Path) -> Iterator[str]:
    """The address of an HTTP server of the test's folder."""
    handler = functools.partial(_QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="http")
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class StallingServer:
    """Answers one HTTP request with the beginning of a file, then says nothing for long."""

    def __init__(self, content: bytes, sent: int) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._content, self._sent = content, sent
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="stalling server")
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/clip.mkv"

    def __enter__(self) -> StallingServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(
                b"HTTP/1.0 200 OK\r\nContent-Type: video/x-matroska\r\n"
                + f"Content-Length: {len(self._content)}\r\n\r\n".encode()
                + self._content[: self._sent]
            )
            self._over.wait(60)


@pytest.fixture
def stalling_server(make_clip: ClipMaker) -> Iterator[StallingServer]:
    """A server that sends half of a clip of 60 pictures."""

    def noise(index: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)

    content = make_clip("half.mkv", frames=60, draw=noise).read_bytes()
    with StallingServer(content, len(content) // 2) as server:
        yield server


class TimedEngine(Engine):
    """An engine that takes its time: one box with a full mask in every picture.

    It keeps the order in which it saw the pictures, and counts what was not released.
    """

    device = "test"

    def __init__(
        self, detect_s: float = 0.0, segment_s: float = 0.0, *, max_batch: int = 1
    ) -> None:
        self.manifest = Manifest(
            name="timed",
            backend="openvino",
            precision="fp32",
            labels=("background", "thing"),
            input=LongestSideInput(longest_side=96),
            graphs=Graphs(GraphFile("none.onnx", "0" * 64)),
        )
        self.max_batch = max_batch
        self.detect_s, self.segment_s = detect_s, segment_s
        self.batches: list[int] = []
        self.held = 0
        self.closed = False
        self.fails_at: dict[str, int] = {}
        self._lock = threading.Lock()

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        time.sleep(self.detect_s)
        self._fail("detect", len(self.batches))
        self.batches.append(len(images))
        count = len(images)
        with self._lock:
            self.held += 1
        return Detections(
            images=images,
            boxes=np.tile(np.float32([1, 1, 20, 20]), (count, 1)),
            scores=np.full(count, 0.9, np.float32),
            labels=np.ones(count, np.int32),
            image_index=np.arange(count, dtype=np.int32),
            features=None,
            release=_Once(self._release),
        )

    def segment(self, detections: Detections) -> list[Instances]:
        time.sleep(self.segment_s)
        self._fail("segment", len(self.batches))
        detections.release()
        crops = np.full((1, 28, 28), 255, np.uint8)
        return [
            Instances(
                width=image.source[1],
                height=image.source[0],
                boxes=detections.boxes[index : index + 1],
                scores=detections.scores[index : index + 1],
                labels=detections.labels[index : index + 1],
                masks=crops,
            )
            for index, image in enumerate(detections.images)
        ]

    def close(self) -> None:
        self.closed = True

    def _release(self) -> None:
        with self._lock:
            self.held -= 1

    def _fail(self, where: str, count: int) -> None:
        if count >= self.fails_at.get(where, 1 << 30):
            raise ZeroDivisionError(f"{where} went wrong")


class _Once:
    """Calls a function the first time that it is called."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


@pytest.fixture
def timed_engine() -> type[TimedEngine]:
    return TimedEngine


def draw_picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Something like a photograph: shapes of many sizes on a smooth background, and noise."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = np.random.default_rng(seed)
    blots = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = np.exp(rng.uniform(np.log(8), np.log(height / 3), 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x - rx, y - ry, x + rx, y + ry), fill=colour, outline=(0, 0, 0))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), np.float64)
    return (blurred + rng.normal(0, 6, blurred.shape)).clip(0, 255).astype(np.uint8)


class Truth(NamedTuple):
    """What torchvision's own modules see in a picture, in the network's input pixels."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32] | None

    def assert_seen(
        self,
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        labels: NDArray[np.integer[Any]],
        masks: NDArray[Any] | None,
    ) -> None:
        """Every detection has its like: box within 0.1 px, score 1e-3, mask 0.01 and rounding.

        Detections of almost the same score may have changed places, also with those that just
        missed the last place.
        """
        assert len(boxes) == len(self.boxes)
        left = list(range(len(boxes)))
        for index, box in enumerate(self.boxes):
            like = [
                other
                for other in left
                if labels[other] == self.labels[index]
                and abs(scores[other] - self.scores[index]) < 1e-3
                and np.abs(boxes[other] - box).max() < 0.1
            ]
            if not like and len(boxes) == 100 and self.scores[index] - self.scores.min() < 1e-4:
                continue
            assert like, f"nothing like detection {index}: {box} {self.scores[index]}"
            left.remove(like[0])
            if masks is not None and self.masks is not None:
                assert np.abs(masks[like[0]] - self.masks[index]).max() < 0.01 + 0.5 / 255


def see_with_torchvision(network: Any, rgb: NDArray[np.uint8]) -> Truth:
    """Run torchvision's modules on a picture that is not resized, and not paste its masks."""
    import torch
    from torchvision.models.detection.image_list import ImageList

    with torch.no_grad():
        picture = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1) / 255
        batch = network.transform.batch_images([network.transform.normalize(picture)], 32)
        images = ImageList(batch, [rgb.shape[:2]])
        features = network.backbone(batch)
        proposals, _ = network.rpn(images, features)
        (found,), _ = network.roi_heads(features, proposals, images.image_sizes)
    masks = found["masks"][:, 0].numpy() if "masks" in found else None
    return Truth(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy(), masks)


def fit(rgb: NDArray[np.uint8], pad_value: int = 99) -> NetworkImage:
    """A picture as it is, padded to multiples of 32."""
    height, width = rgb.shape[:2]
    rows, columns = -height % 32, -width % 32
    pixels = np.pad(rgb, ((0, rows), (0, columns), (0, 0)), constant_values=pad_value)
    return NetworkImage(pixels, (height, width), (height, width))


@pytest.fixture(scope="session")
def parity() -> Parity:
    """What parity tests share: pictures, torchvision's answers, and networks worth comparing."""
    return Parity()


class Parity:
    truth = Truth
    draw_picture = staticmethod(draw_picture)
    see_with_torchvision = staticmethod(see_with_torchvision)
    fit = staticmethod(fit)

    @functools.cached_property
    def network(self) -> Any:
        """A Mask R-CNN (ResNet-50-FPN, 20 classes) of random weights whose outputs spread.

        As they are, random weights give equal scores and boxes that do not move, and any two
        implementations agree on nothing. So each norm takes the statistics of its input, and the
        last layers are scaled to give what trained ones give.
        """
        import torch
        from torch.nn import Module
        from torchvision.ops.misc import FrozenBatchNorm2d

        from builder.network import build_network, network_config

        torch.manual_seed(0)
        network = build_network(network_config("resnet50-fpn", tuple("abcdefghijklmnopqrst")))
        network.transform.min_size, network.transform.max_size = (320,), 576
        heads = network.roi_heads
        spread = {
            network.rpn.head.cls_logits: 2.0,
            network.rpn.head.bbox_pred: 0.3,
            heads.box_predictor.cls_score: 1.8,
            heads.box_predictor.bbox_pred: 0.5,
            heads.mask_predictor.mask_fcn_logits: 1.0,
        }

        def set_statistics(norm: Module, inputs: tuple[torch.Tensor]) -> None:
            norm.get_buffer("running_mean").copy_(inputs[0].mean((0, 2, 3)))
            norm.get_buffer("running_var").copy_(inputs[0].var((0, 2, 3)))

        def scale(layer: Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
            deviation = spread.pop(layer, None)  # the RPN's head runs once a level: on P2 only
            if deviation is None:
                return None
            others = [axis for axis in range(output.ndim) if axis != 1]
            channels = [1, -1, *[1] * (output.ndim - 2)]
            factor, mean = deviation / output.std(others), output.mean(others)
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
            bias.copy_((bias - mean) * factor)
            return (output - mean.reshape(channels)) * factor.reshape(channels)

        hooks = [
            module.register_forward_pre_hook(set_statistics)
            for module in network.modules()
            if isinstance(module, FrozenBatchNorm2d)
        ]
        hooks += [layer.register_forward_hook(scale) for layer in spread]
        with torch.no_grad():
            network.eval()
            network([torch.from_numpy(draw_picture(320, 576)).permute(2, 0, 1) / 255])
        for hook in hooks:
            hook.remove()
        return network

    @functools.cached_property
    def truths(self) -> list[tuple[NDArray[np.uint8], Truth]]:
        """Two pictures, one of which must be padded, and what torchvision sees in them."""
        pictures = [draw_picture(320, 576), draw_picture(250, 440, seed=1)]
        return [(rgb, see_with_torchvision(self.network, rgb)) for rgb in pictures]


@pytest.fixture(scope="session")
def calibrated_bundle(parity: Parity, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of ``parity.network``, built from a checkpoint as a user builds his."""
    from builder.build import build
    from builder.checkpoint import save_model
    from builder.network import network_config

    folder = tmp_path_factory.mktemp("calibrated")
    config = network_config("resnet50-fpn", tuple("abcdefghijklmnopqrst"))
    save_model(folder / "model.pth", config, parity.network.state_dict(), {})
    return build(folder / "model.pth", folder / "bundle", size=(320, 576))


@pytest.fixture(scope="session")
def unthresholded_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The default model with the score threshold inside it at 0: it sees something everywhere."""
    import onnx
    from msgspec.structs import replace

    from engines.bundle import open_bundle, sha256

    default = open_bundle("default")
    graph = onnx.load(default.detector)
    *_, last_nms = (node for node in graph.graph.node if node.op_type == "GroupedNms")
    (threshold,) = (item for item in last_nms.attribute if item.name == "score_threshold")
    threshold.f = 0.0
    folder = tmp_path_factory.mktemp("unthresholded")
    onnx.save(graph, folder / "detector.onnx")
    assert default.segmenter is not None
    (folder / "segmenter.onnx").write_bytes(default.segmenter.read_bytes())
    graphs = replace(
        default.manifest.graphs,
        detector=GraphFile("detector.onnx", sha256(folder / "detector.onnx")),
    )
    return Bundle(folder, replace(default.manifest, graphs=graphs))
