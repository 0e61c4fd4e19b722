"""Unusual sources: each ends on its own or is refused, with a reason of one line."""

import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from witnesses import configured, wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources import images as images_module
from maskcast.pipeline.sources.images import ImageSource
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import SourceLostError

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"></svg>'


def problem_of(url: str | Path) -> str:
    with pytest.raises(InputError) as caught, create_source(SourceConfig(url=str(url))):
        pass
    return str(caught.value)


@pytest.fixture
def without_decoder(tmp_path: Path, make_clip) -> list[Path]:
    """Make videos that FFmpeg recognises and has no decoder for."""
    (tmp_path / "a.svg").write_text(SVG)
    mp4 = make_clip("fourcc.mp4").read_bytes()
    (tmp_path / "fourcc.mp4").write_bytes(mp4.replace(b"avc1\0\0\0\0", b"QQQQ\0\0\0\0"))
    mkv = make_clip("id.mkv").read_bytes()
    assert b"V_MPEG4/ISO/AVC" in mkv
    (tmp_path / "id.mkv").write_bytes(mkv.replace(b"V_MPEG4/ISO/AVC", b"V_FOO/BAR/QUX/1"))
    return [tmp_path / name for name in ("a.svg", "fourcc.mp4", "id.mkv")]


def test_a_video_without_a_decoder_is_named(without_decoder: list[Path]) -> None:
    for path in without_decoder:
        assert f"{path}: FFmpeg has no decoder for this video" in problem_of(path)


def test_sources_without_a_decoder_end_alone(
    without_decoder: list[Path], http_server: str, timed_engine
) -> None:
    camera = {"url": f"{http_server}/a.svg", "name": "http"}
    config = configured("test://64x48@50", *without_decoder, camera)
    pipeline = Pipeline(config, timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 20)
    wait_until(lambda: sum(bool(source.ended) for source in pipeline.stats().sources) == 3)
    good, *bad, http = pipeline.stats().sources
    assert good.ended is None
    assert all("no decoder" in (source.ended or "") for source in bad)
    wait_until(lambda: "no decoder" in pipeline.stats().sources[-1].detail)
    assert http.ended is None  # the server may serve something else later
    pipeline.stop()
    pipeline.join()


def test_an_unexpected_error_ends_one_source_and_is_logged_with_its_traceback(
    timed_engine, tmp_path: Path, monkeypatch, caplog
) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError("a defect of a library")

    monkeypatch.setattr(images_module, "decode_image", fail)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pipeline = Pipeline(configured("test://64x48@50", tmp_path / "a.png"), timed_engine(), limit=20)
    with pytest.raises(ZeroDivisionError):  # once the others have ended
        pipeline.run()
    good, bad = pipeline.stats().sources
    assert (good.ended, good.processed > 0) == ("limit", True)
    assert bad.ended == "unexpected ZeroDivisionError"
    (record,) = (record for record in caplog.records if record.msg == "source_failed")
    assert record.levelname == "ERROR"
    assert record.exc_info is not None


@pytest.mark.parametrize("size", [(30_000, 8), (8, 30_000)])
def test_images_too_large_to_be_published_are_refused(tmp_path: Path, size) -> None:
    Image.new("RGB", size).save(tmp_path / "wide.png")
    problem = problem_of(tmp_path / "wide.png")
    assert f"{size[0]}x{size[1]} pixels, more than 16384 on a side" in problem


def test_a_video_too_large_to_be_published_is_refused(make_clip) -> None:
    clip = make_clip("wide.mkv", frames=2, width=20_000, height=16, codec="ffv1", pix_fmt="bgr0")
    assert "20000x16 pixels, more than 16384 on a side" in problem_of(clip)


def test_a_named_pipe_is_read_to_its_end(make_clip, tmp_path: Path) -> None:
    clip, pipe = make_clip("a.mkv"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(clip.read_bytes()))
    writer.start()
    with create_source(SourceConfig(url=str(pipe))) as source:
        assert [frame.index for frame in source] == list(range(10))
    writer.join()


def test_standard_input_is_read_to_its_end(make_clip, monkeypatch) -> None:
    clip = make_clip("a.mkv")
    script = (
        "from maskcast.pipeline.configuration.config import SourceConfig\n"
        "from maskcast.pipeline.sources.open import create_source\n"
        "with create_source(SourceConfig(url='-')) as source:\n"
        "    print(source.name, len(list(source)))\n"
    )

    def read(**standard_input) -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, check=True, **standard_input).stdout

    assert read(input=clip.read_bytes()) == b"stdin 10\n"  # a pipe
    with clip.open() as file:
        assert read(stdin=file) == b"stdin 10\n"


def test_what_cannot_be_read_from_a_pipe_is_refused(make_clip, tmp_path: Path) -> None:
    def noise(index: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)

    clip = make_clip("a.mp4", frames=20, width=640, height=480, draw=noise)
    for content in (b"no video" * 1000, clip.read_bytes()):
        pipe = tmp_path / f"pipe{len(content)}"
        os.mkfifo(pipe)
        with ThreadPoolExecutor() as pool:
            writing = pool.submit(pipe.write_bytes, content)
            assert "; send Matroska or MPEG-TS" in problem_of(pipe)
            with suppress(BrokenPipeError):
                writing.result()


def test_a_terminal_as_standard_input_is_refused() -> None:
    script = "from maskcast import run; run('-')"
    parent, child = pty.openpty()
    ran = subprocess.run([sys.executable, "-c", script], stdin=child, capture_output=True)
    os.close(parent)
    os.close(child)
    assert b"-: standard input is a terminal; pipe a video into the command" in ran.stderr


def test_a_named_pipe_without_a_writer_can_be_removed(timed_engine, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    config = configured("test://64x48@50", {"url": str(pipe), "name": "pipe"})
    pipeline = Pipeline(config, timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 2)
    pipeline.remove("pipe")
    wait_until(lambda: [source.name for source in pipeline.sources()] == ["test"])
    pipeline.stop()
    pipeline.join()


class AskedServer(threading.Thread):
    """Counts connections, and serves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.asked += 1
                connection.close()


@pytest.fixture
def asked_server() -> Iterator[AskedServer]:
    server = AskedServer()
    server.start()
    yield server
    server.listener.shutdown(socket.SHUT_RDWR)
    server.join()
    server.listener.close()


def test_a_playlist_on_this_machine_reaches_no_network(tmp_path: Path, asked_server) -> None:
    playlist = tmp_path / "a.m3u8"
    segment = f"http://127.0.0.1:{asked_server.port}/a.ts"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n"
    )
    problem_of(playlist)
    assert asked_server.asked == 0


def test_a_playlist_over_http_reaches_no_file(make_clip, tmp_path: Path, http_server: str) -> None:
    clip = make_clip("a.ts")
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    for segment, is_read in (("a.ts", True), (f"file://{clip}", False)):
        (tmp_path / "a.m3u8").write_text(f"{head}{segment}\n#EXT-X-ENDLIST\n")
        config = SourceConfig(url=f"{http_server}/a.m3u8", open_timeout_s=60)
        stopping = threading.Event()
        source = create_source(config, stopping=stopping)
        timer = threading.Timer(1.0 if not is_read else 100.0, stopping.set)
        timer.start()
        if is_read:
            with source:
                assert len(list(source)) == 10
        else:
            with pytest.raises(SourceLostError), source:
                pass
        timer.cancel()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.ts", "libx264", "yuv420p"), ("a.gif", "gif", "rgb8"), ("a.mkv", "libx264", "yuv420p")],
)
def test_a_finite_file_over_http_ends(
    make_clip, http_server: str, name: str, codec: str, pix_fmt: str
) -> None:
    make_clip(name, codec=codec, pix_fmt=pix_fmt)
    with create_source(SourceConfig(url=f"{http_server}/{name}")) as source:
        assert not source.live
        assert [frame.index for frame in source] == list(range(10))


def test_an_mp4_without_its_index_is_explained(make_clip) -> None:
    clip = make_clip("a.mp4", frames=30)
    whole = clip.read_bytes()
    clip.write_bytes(whole[: whole.rindex(b"moov") - 4])
    assert "this MP4 file has no index (moov)" in problem_of(clip)


def reason_of(url: str) -> str:
    """Return why a live source cannot be read."""
    changes, stopping = [], threading.Event()
    source = create_source(SourceConfig(url=url, open_timeout_s=5), changes.append, stopping)

    def open_it() -> None:
        with suppress(SourceLostError), source:
            pass

    opening = threading.Thread(target=open_it)
    opening.start()
    wait_until(lambda: any(change.reason for change in changes))
    stopping.set()
    opening.join()
    return next(change.reason for change in changes if change.reason)


def test_a_web_page_is_explained(tmp_path: Path, http_server: str) -> None:
    (tmp_path / "watch.html").write_text("<!DOCTYPE html><html><body>film</body></html>" * 99)
    assert "give the URL of the stream itself" in reason_of(f"{http_server}/watch.html")


@pytest.mark.parametrize("kind", ["rtsp", "http"])
def test_an_unknown_host_is_named(kind: str) -> None:
    reason = reason_of(f"{kind}://admin:secret@camera.invalid/stream")
    assert "unknown host 'camera.invalid'" in reason
    assert "secret" not in reason


def test_a_looped_folder_whose_images_vanish_ends(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with ImageSource(SourceConfig(url=str(tmp_path), loop=True)) as source:
        frames = iter(source)
        assert [next(frames).file for _ in range(2)] == ["a.png", "b.png"]
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(SourceLostError, match="none of its images can be read any more"):
            next(frames)
        assert source.corrupt == 2


def test_a_damaged_image_is_named_once(tmp_path: Path, caplog) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    with ImageSource(SourceConfig(url=str(tmp_path), loop=True, name="photos")) as source:
        frames = iter(source)
        assert [next(frames).file for _ in range(3)] == ["a.png"] * 3
    named = [record.fields for record in caplog.records if record.msg == "image_unreadable"]
    assert [(each["source"], each["file"]) for each in named] == [("photos", "b.png")]


def test_images_have_even_times_and_none_is_kept_alive(tmp_path: Path, monkeypatch) -> None:
    gone = []

    class Noticed(images_module.Frame):
        def __del__(self) -> None:
            gone.append(self.index)

    monkeypatch.setattr(images_module, "Frame", Noticed)
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    with ImageSource(SourceConfig(url=str(tmp_path), fps=4)) as source:
        times_s = []
        for frame in source:
            times_s.append(frame.pts_s)
            del frame
            assert len(gone) >= len(times_s) - 1
    assert times_s == [0, 0.25, 0.5, 0.75]


def test_motion_jpeg_over_http_has_the_times_of_its_arrival(make_clip, timed_engine) -> None:
    """FFmpeg alone would assume 25 frames per second."""
    clip = make_clip("a.mjpeg", frames=12, codec="mjpeg", pix_fmt="yuvj420p")
    start = b"\xff\xd8\xff"
    jpegs = [start + part for part in clip.read_bytes().split(start)[1:]]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                kind = b"multipart/x-mixed-replace; boundary=cam"
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n")
                for number in range(1000):
                    part = jpegs[number % len(jpegs)]
                    head = f"--cam\r\nContent-Type: image/jpeg\r\nContent-Length: {len(part)}"
                    connection.sendall(head.encode() + b"\r\n\r\n" + part + b"\r\n")
                    time.sleep(0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    frames = []
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/cam"
    pipeline = Pipeline(
        configured(url), timed_engine(), on_frame=lambda frame, *_: frames.append(frame), limit=12
    )
    try:
        pipeline.run()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert (frames[0].index == 0) == (frames[0].pts_s == 0.0)  # a busy machine drops the first
    assert all(before.pts_s < after.pts_s for before, after in pairwise(frames))
    captured_s = (frames[-1].capture_ns - frames[0].capture_ns) / 1e9
    assert frames[-1].pts_s == pytest.approx(captured_s, abs=0.5)
    assert frames[-1].pts_s > 11 * 0.1  # 0.44 s at 25 frames per second
