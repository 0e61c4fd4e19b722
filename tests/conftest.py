"""Fixtures for all tests: clips that are made when needed, and real servers to read them from."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

from maskcast.engines.bundle import GraphFile, Graphs, LongestSideInput, Manifest
from maskcast.engines.engine import Detections, Engine
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints

pytest_plugins = ("parity",)

SYSTEM_PYTHON = "/usr/bin/python3"
_HAS_RTSP = (
    "import gi; gi.require_version('GstRtspServer', '1.0');"
    "from gi.repository import Gst, GstRtspServer; Gst.init(None);"
    "assert Gst.ElementFactory.find('x264enc')"
)

# Started with nohup or "&", pytest ignores SIGINT, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled graphs are stored in a folder of this session's own; pip keeps its cache.
_cache = tempfile.TemporaryDirectory(prefix="maskcast-tests-")
atexit.register(_cache.cleanup)
_users_cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
os.environ.setdefault("PIP_CACHE_DIR", f"{_users_cache}/pip")
os.environ["XDG_CACHE_HOME"] = _cache.name

# A deadline for each example fails on a busy machine.
hypothesis.settings.register_profile("maskcast", deadline=None)
hypothesis.settings.load_profile("maskcast")

ClipMaker = Callable[..., Path]


def numbered_image(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """Return an image whose grey level encodes its index (below 64), also after lossy coding."""
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
        draw: Callable[[int, int, int], NDArray[np.uint8]] = numbered_image,
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
                decoded = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pix_fmt)
                container.mux(stream.encode(decoded))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def free_port() -> int:
    from ports import find_free_port  # here, since programs that tests start import this file

    return find_free_port()


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
def _rtsp_error() -> str:
    """Return why no RTSP server can be started, or an empty string."""
    if not Path(SYSTEM_PYTHON).exists():
        return f"there is no {SYSTEM_PYTHON}"
    probe = subprocess.run([SYSTEM_PYTHON, "-c", _HAS_RTSP], capture_output=True, text=True)
    return "" if probe.returncode == 0 else "GStreamer's RTSP server is not installed"


@pytest.fixture
def rtsp_server(free_port: int) -> Iterator[RtspServer]:
    """An RTSP server on this machine, not yet started; skips where GStreamer is absent."""
    if reason := _rtsp_error():
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
    """Answers one HTTP request with the beginning of a file, then sends nothing more."""

    def __init__(self, content: bytes, sent: int) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._content, self._sent = content, sent
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="stalling server")
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/clip.mkv"

    def __enter__(self) -> StallingServer:
        self._thread.start()
        return self

    def release(self) -> None:
        """Close the connection, so that a read that hangs ends."""
        self._over.set()

    def __exit__(self, *_: object) -> None:
        self.release()
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
            self._over.wait(200)


@pytest.fixture
def stalling_server(make_clip: ClipMaker) -> Iterator[StallingServer]:
    """A server that sends half of a clip of 60 frames."""

    def noise(index: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)

    content = make_clip("half.mkv", frames=60, draw=noise).read_bytes()
    with StallingServer(content, len(content) // 2) as server:
        yield server


CORNERS = Keypoints(("left_top", "right_bottom"), ((0, 1),))


class TimedEngine(Engine):
    """An engine with set durations: it finds one box with a full mask in every image.

    It records the size of each batch and counts the detections that are not released. With
    ``pose_s`` it has a poser: the corners of the box are keypoints.
    """

    device = "test"

    def __init__(
        self,
        detect_s: float = 0.0,
        segment_s: float = 0.0,
        *,
        pose_s: float | None = None,
        max_batch: int = 1,
    ) -> None:
        self.has_pose, self.pose_s = pose_s is not None, pose_s or 0.0
        graph = GraphFile("none.onnx", "0" * 64)
        self.manifest = Manifest(
            name="timed",
            backend="openvino",
            precision="fp32",
            labels=("background", "thing"),
            input=LongestSideInput(longest_side=96),
            graphs=Graphs(graph, poser=graph if self.has_pose else None),
            keypoints=CORNERS if self.has_pose else None,
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

    def estimate_pose(self, detections: Detections) -> Detections:
        time.sleep(self.pose_s)
        self._fail("estimate_pose", len(self.batches))
        corners = detections.boxes.reshape(-1, 2, 2)
        scores = np.full((len(corners), 2, 1), 0.75, np.float32)
        return replace(detections, keypoints=np.concatenate([corners, scores], axis=2))

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
                keypoints=None
                if detections.keypoints is None
                else detections.keypoints[index : index + 1],
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


@pytest.fixture(scope="session")
def timed_engine() -> type[TimedEngine]:
    return TimedEngine
