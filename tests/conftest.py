"""What tests of several rooms share: clips made on the spot, and real servers to read them from."""

from __future__ import annotations

import functools
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

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
