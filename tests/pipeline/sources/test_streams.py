"""Streams over UDP and RTMP, and the screen: real senders, a real server, a real display."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from cameras import watch

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.open import check_source
from maskcast.pipeline.sources.video import VideoSource

RTMP_MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")


class Sender(threading.Thread):
    """FFmpeg, sending H.264 at 25 frames per second."""

    def __init__(self, url: str, form: str, width: int = 160) -> None:
        super().__init__(name="sender")
        self._stopping = threading.Event()
        self._url, self._form, self._width = url, form, width

    def run(self) -> None:
        with av.open(self._url, "w", format=self._form) as output:
            options = {"tune": "zerolatency", "preset": "ultrafast", "g": "10"}
            stream = output.add_stream("libx264", rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = self._width, 120, "yuv420p"
            index = 0
            while not self._stopping.wait(0.04):
                image = np.full((120, self._width, 3), index % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts, index = index, index + 1
                output.mux(stream.encode(frame))

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)
        assert not self.is_alive()


@contextmanager
def sending(url: str, form: str, width: int = 160) -> Iterator[Sender]:
    sender = Sender(url, form, width)
    sender.start()
    try:
        yield sender
    finally:
        sender.stop()


def listeners(port: int) -> list[str]:
    """Return the local addresses, in hexadecimal, of the UDP sockets on a port."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return [line.split()[1] for line in lines if line.split()[1].endswith(f":{port:04X}")]


def test_a_stream_over_udp_is_read_and_reconnected(free_port: int) -> None:
    url = f"udp://127.0.0.1:{free_port}"
    with watch(url, read_timeout_s=2.0) as watched:
        with sending(f"{url}?pkt_size=1316", "mpegts"):
            frames = watched.wait_for_frames(30)
            assert listeners(free_port) == [f"0100007F:{free_port:04X}"]  # no other interface
        watched.wait_for_state("reconnecting")
        with sending(f"{url}?pkt_size=1316", "mpegts", width=320):
            watched.wait_for_state("streaming")
            watched.wait_for_frames(10)
        watched.assert_in_order()
    assert (frames[0].decoded.width, watched.frames[-1].decoded.width) == (160, 320)


def test_a_port_where_nothing_arrives_is_named(free_port: int) -> None:
    config = SourceConfig(url=f"udp://127.0.0.1:{free_port}", open_timeout_s=0.5)
    with pytest.raises(InputError, match=r"no data within 0.5 s; check the sender and the port"):
        VideoSource(config).open()


@pytest.fixture
def rtmp_server(free_port: int, tmp_path: Path) -> Iterator[str]:
    """Start an RTMP server on this machine; yield the address of a stream."""
    if shutil.which("nginx", path="/usr/sbin:/usr/bin") is None or not RTMP_MODULE.exists():
        pytest.skip("nginx with its RTMP module is not installed")
    (tmp_path / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/log;
        load_module {RTMP_MODULE};
        events {{}}
        rtmp {{ server {{ listen 127.0.0.1:{free_port}; application live {{ live on; }} }} }}
        """
    )
    server = subprocess.Popen(["/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf")])
    yield f"rtmp://127.0.0.1:{free_port}/live/cam"
    server.terminate()
    server.wait()


def test_a_stream_over_rtmp_is_read_and_reconnected(rtmp_server: str) -> None:
    with watch(rtmp_server, open_timeout_s=3.0, read_timeout_s=2.0) as watched:
        with sending_to_server(rtmp_server):
            watched.wait_for_frames(30)
        watched.wait_for_state("reconnecting")
        with sending_to_server(rtmp_server):
            watched.wait_for_state("streaming")
            watched.wait_for_frames(10)
        watched.assert_in_order()


@contextmanager
def sending_to_server(url: str) -> Iterator[None]:
    """Send once the server accepts a stream."""
    deadline_s = time.monotonic() + 30
    while True:
        with sending(url, "flv") as sender:
            time.sleep(0.3)
            if sender.is_alive():
                yield
                return
        assert time.monotonic() < deadline_s


def test_an_rtmp_server_that_is_off_is_named(free_port: int) -> None:
    config = SourceConfig(url=f"rtmp://127.0.0.1:{free_port}/live/cam")
    with pytest.raises(InputError, match="connection refused; check the address"):
        VideoSource(config).open()


@pytest.fixture
def display() -> Iterator[str]:
    """Start a virtual X11 display of 320x240 pixels; yield its name."""
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "320x240x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as lines:
        yield f":{lines.readline().strip()}"
    server.terminate()
    server.wait()


def test_the_screen_is_read(display: str, monkeypatch) -> None:
    monkeypatch.setenv("DISPLAY", display)
    for url in ("screen://", f"screen://{display}"):
        with watch(url) as watched:
            (*_, frame) = watched.wait_for_frames(5)
            watched.assert_in_order()
        assert (frame.decoded.width, frame.decoded.height) == (320, 240)
        assert watched.frames[0].pts_s == 0.0
        assert frame.clock == "receipt"


def test_a_screen_that_is_no_display_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(
        InputError, match=r"\$DISPLAY is not set; give one, for example screen://:0"
    ):
        check_source(SourceConfig(url="screen://"))
    with pytest.raises(InputError, match="'0' is not an X11 display"):
        check_source(SourceConfig(url="screen://0"))
