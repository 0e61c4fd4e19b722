import gc
import random
import signal
import socket
import statistics
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from cameras import TIMEOUT_S, watch
from witnesses import wait_until

from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.sources import live as live_source
from maskcast.pipeline.sources.connection import Connection
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import SourceLostError


def sizes(frames: list[Frame]) -> set[tuple[int, int]]:
    return {(frame.decoded.width, frame.decoded.height) for frame in frames}


def test_a_camera_that_is_killed_and_started_again_is_read_again_soon(rtsp_server) -> None:
    rtsp_server.start()
    with watch(rtsp_server.url) as watched:
        watched.wait_for_frames()
        rtsp_server.stop()
        watched.wait_for_state("reconnecting")
        time.sleep(2.0)  # by now the waits are at their longest
        rtsp_server.start()
        watched.wait_for_state("streaming")
        watched.wait_for_frames()
        watched.assert_in_order()
    assert watched.states[:2] == ["connecting", "streaming"]
    assert watched.changes[-1].state == "ended"
    assert watched.changes[-1].reconnects == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_a_camera_stopped_for_seconds_stalls_and_reconnects(rtsp_server) -> None:
    rtsp_server.start()
    with watch(rtsp_server.url, read_timeout_s=2.0) as watched:
        watched.wait_for_frames()
        stopped_s = time.monotonic()
        rtsp_server.signal(signal.SIGSTOP)
        watched.wait_for_state("stalled")
        assert time.monotonic() - stopped_s > 0.3  # a busy reader has heard the last frame before
        watched.wait_for_state("reconnecting")
        assert time.monotonic() - stopped_s > 1.3
        time.sleep(2.0)  # by now the waits are at their longest
        rtsp_server.signal(signal.SIGCONT)
        watched.wait_for_state("streaming")
        watched.wait_for_frames()
        watched.assert_in_order()
    first = list(dict.fromkeys(watched.states))  # a busy machine may stall it more often
    assert first == ["connecting", "streaming", "stalled", "reconnecting", "ended"]


def test_a_short_silence_stalls_and_needs_no_reconnect(rtsp_server) -> None:
    rtsp_server.start()
    with watch(rtsp_server.url) as watched:
        watched.wait_for_frames()
        rtsp_server.signal(signal.SIGSTOP)
        watched.wait_for_state("stalled")
        rtsp_server.signal(signal.SIGCONT)
        watched.wait_for_frames()
    assert watched.states[:4] == ["connecting", "streaming", "stalled", "streaming"]
    assert "reconnecting" not in watched.states


@pytest.mark.parametrize(
    "changed",
    [("--width", "640", "--height", "360"), ("--fps", "15"), ("--codec", "h265")],
    ids=["size", "rate", "H.265"],
)
def test_a_camera_may_return_with_other_settings(rtsp_server, changed: tuple[str, ...]) -> None:
    rtsp_server.start("--width", "320", "--height", "240", "--fps", "30")
    with watch(rtsp_server.url) as watched:
        assert sizes(watched.wait_for_frames()) == {(320, 240)}
        rtsp_server.stop()
        rtsp_server.start(*changed)
        wait_until(lambda: watched.changes[-1].reconnects >= 1)
        frames = watched.wait_for_frames(15)
        assert sizes(frames[-10:]) == {(640, 360) if "--width" in changed else (320, 240)}
        if "--fps" in changed:
            times_s = [frame.pts_s or 0.0 for frame in frames[-10:]]
            steps_s = [after - before for before, after in pairwise(times_s)]
            assert statistics.median(steps_s) == pytest.approx(1 / 15, rel=0.1)
        watched.assert_in_order()


def test_frames_after_a_reconnect_have_the_interval_of_the_camera_from_the_first_on(
    rtsp_server,
) -> None:
    rtsp_server.start("--fps", "10")
    with watch(rtsp_server.url) as watched:
        watched.wait_for_frames(8)
        rtsp_server.stop()
        rtsp_server.start("--fps", "10")
        wait_until(lambda: watched.changes[-1].reconnects >= 1)
        watched.wait_for_frames(8)
        times_s = [frame.pts_s or 0.0 for frame in watched.frames]
    steps_s = [after - before for before, after in pairwise(times_s)]
    assert max(steps_s) > 0.15  # the outage
    assert min(steps_s) > 0.095  # a busy machine may miss frames


def test_a_camera_over_udp_that_is_killed_is_reconnected(rtsp_server) -> None:
    rtsp_server.start()
    with watch(rtsp_server.url, rtsp_transport="udp", read_timeout_s=1.0) as watched:
        watched.wait_for_frames(30)
        rtsp_server.stop()
        watched.wait_for_state("reconnecting")
        rtsp_server.start()
        watched.wait_for_state("streaming")
        watched.wait_for_frames()
        watched.assert_in_order()


def test_the_capture_time_is_the_cameras_once_it_is_known(rtsp_server) -> None:
    rtsp_server.start()
    with watch(rtsp_server.url, rtsp_transport="udp") as watched:
        wait_until(lambda: watched.frames and watched.frames[-1].clock == "sender")
        frames = watched.wait_for_frames()
        now_ns = time.time_ns()
    assert watched.frames[0].clock == "receipt"
    assert {frame.clock for frame in frames} == {"sender"}
    assert 0 < now_ns - frames[-1].capture_ns < 30_000_000_000
    for before, after in pairwise(frame.capture_ns for frame in frames):
        intervals = (after - before) * 30 / 1e9  # more than 1 where a busy machine missed frames
        assert round(intervals) >= 1
        assert intervals == pytest.approx(round(intervals), abs=0.06)  # unlike times of arrival


def bit_errors(number: int, packet: bytearray) -> list[bytes]:
    chance = random.Random(number)
    if number % 8 == 5:
        for _ in range(4):
            packet[chance.randrange(12, len(packet))] ^= 1 << chance.randrange(8)
    return [bytes(packet)]


def missing_packets(number: int, packet: bytearray) -> list[bytes]:
    return [] if number % 7 == 3 else [bytes(packet)]


def repeated_packets(number: int, packet: bytearray) -> list[bytes]:
    return [bytes(packet)] * (1 + number % 3)


def truncated_packets(number: int, packet: bytearray) -> list[bytes]:
    return [bytes(packet[: max(14, len(packet) // 2) if number % 8 == 5 else len(packet)])]


def shift_times(by_s: int):
    def shift(number: int, packet: bytearray) -> list[bytes]:
        if number >= 60:
            time_90khz = int.from_bytes(packet[4:8]) + by_s * 90_000
            packet[4:8] = (time_90khz % (1 << 32)).to_bytes(4)
        return [bytes(packet)]

    return shift


def wrap_times(number: int, packet: bytearray) -> list[bytes]:
    """Let the 32 bits of RTP's time overflow after two seconds, as they do every 13 hours."""
    packet[4:8] = ((1 << 32) - 180_000 + number * 3_000 & 0xFFFFFFFF).to_bytes(4)
    return [bytes(packet)]


@pytest.mark.parametrize(
    "fault",
    [
        bit_errors,
        missing_packets,
        repeated_packets,
        truncated_packets,
        pytest.param(shift_times(3600), id="times jump"),
        pytest.param(shift_times(-3600), id="times go back"),
        wrap_times,
    ],
)
def test_packet_errors_cost_frames_but_not_the_stream(rtsp_server, faulty_link, fault) -> None:
    rtsp_server.start("--width", "160", "--height", "120", "--fps", "60")
    faulty_link.fault = fault
    with watch(faulty_link.url, read_timeout_s=2.0) as watched:
        wait_until(lambda: watched.frames)
        time.sleep(1.2)
        watched.wait_for_frames(20)
        watched.assert_in_order()
        assert watched.frames[-1].pts_s < 600.0


def test_a_stream_without_key_frames_for_seconds_is_waited_for(rtsp_server, faulty_link) -> None:
    rtsp_server.start()
    began_s = time.monotonic()

    def no_key_frame(number: int, packet: bytearray) -> list[bytes]:
        kind = packet[12] & 31
        is_key = (packet[13] & 31 if kind == 28 else kind) in (5, 7, 8, 24)
        return [] if is_key and time.monotonic() - began_s < 6.0 else [bytes(packet)]

    faulty_link.fault = no_key_frame
    with watch(faulty_link.url, read_timeout_s=3.0) as watched:
        watched.wait_for_frames(10)
        assert watched.at_s[0] - began_s > 5.9
    assert "reconnecting" not in watched.states


def test_a_camera_that_answers_and_sends_nothing_is_reconnected(rtsp_server, faulty_link) -> None:
    rtsp_server.start()
    faulty_link.fault = lambda number, packet: []
    with watch(faulty_link.url, open_timeout_s=1.0, read_timeout_s=1.0) as watched:
        change = watched.wait_for_state("reconnecting")
        assert "no answer within 1 s" in change.reason
        faulty_link.fault = lambda number, packet: [bytes(packet)]
        watched.wait_for_state("streaming")


def test_a_wrong_password_is_reported_without_it_and_retried_slowly(
    rtsp_server, monkeypatch
) -> None:
    monkeypatch.setattr(live_source, "FIRST_DENIED_WAIT_S", 4.0)
    rtsp_server.start("--credentials", "admin:other")
    url = rtsp_server.url.replace("//", "//admin:hunter2@")
    with watch(url) as watched:
        change = watched.wait_for_state("reconnecting")
        assert "access denied" in change.reason
        denied_s = time.monotonic()
        rtsp_server.stop()
        rtsp_server.start("--credentials", "admin:hunter2")
        watched.wait_for_frames()
        assert watched.at_s[0] - denied_s > 0.9
    reported = repr(watched.changes) + "".join(t.name for t in threading.enumerate())
    assert "hunter2" not in reported


def test_a_camera_that_starts_late_is_read(rtsp_server) -> None:
    with watch(rtsp_server.url) as watched:
        change = watched.wait_for_state("reconnecting")
        assert "connection refused" in change.reason
        time.sleep(1.0)
        rtsp_server.start()
        watched.wait_for_state("streaming")
    assert watched.changes[-1].reconnects == 0


def test_a_source_whose_server_never_answers_stops_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/cam"
        with watch(url, open_timeout_s=0.5) as watched:
            change = watched.wait_for_state("reconnecting")
            assert "no answer within 0.5 s" in change.reason
            stopped_s = time.monotonic()
            watched.stop()
            assert time.monotonic() - stopped_s < TIMEOUT_S
    assert isinstance(watched.error, SourceLostError)
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("read")])


def test_many_reconnects_leave_nothing_behind(rtsp_server, faulty_link, no_collector) -> None:
    """Each connection is cut after some packets, as by a router that forgets it."""
    rtsp_server.start("--width", "160", "--height", "120")

    def cut(number: int, packet: bytearray) -> list[bytes]:
        if number == 20:
            raise EOFError
        return [bytes(packet)]

    faulty_link.fault = cut
    handles, threads, connections = [], [], []
    with watch(faulty_link.url) as watched:
        for reconnects in (2, 6):
            wait_until(lambda n=reconnects: watched.changes[-1].reconnects >= n)
            handles.append(
                len(list(Path("/proc/self/fd").iterdir())) - 2 * len(faulty_link._sockets)
            )
            threads.append(sum(t.name.startswith("read") for t in threading.enumerate()))
            connections.append(sum(isinstance(each, Connection) for each in gc.get_objects()))
        watched.assert_in_order()
    assert max(threads) <= 2
    assert max(connections) <= 2, "the one that is read, and the last before it"
    assert handles[1] - handles[0] <= 6


def serve_motion_jpeg(listener: socket.socket, jpegs: list[bytes]) -> None:
    """Send the jpegs to one reader after the other, as IP cameras do, and hang up."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(
                    b"HTTP/1.0 200 OK\r\n"
                    b"Content-Type: multipart/x-mixed-replace; boundary=cam\r\n\r\n"
                )
                for jpeg in jpegs:
                    head = f"--cam\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}"
                    connection.sendall(head.encode() + b"\r\n\r\n" + jpeg + b"\r\n")
                    time.sleep(0.02)


def test_motion_jpeg_over_http_is_read_and_reconnected(make_clip) -> None:
    clip = make_clip("a.mjpeg", frames=40, codec="mjpeg", pix_fmt="yuvj420p")
    start_of_image = b"\xff\xd8\xff"
    jpegs = [start_of_image + part for part in clip.read_bytes().split(start_of_image)[1:]]
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve_motion_jpeg, args=(listener, jpegs))
    thread.start()
    try:
        with watch(f"http://127.0.0.1:{listener.getsockname()[1]}/cam") as watched:
            wait_until(lambda: watched.frames and watched.changes[-1].reconnects >= 2)
            watched.wait_for_frames(20)
            watched.assert_in_order()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert len(watched.frames) > 40  # more than one connection delivers


def test_a_finite_video_over_http_is_not_live(make_clip, http_server: str) -> None:
    make_clip("a.mp4", frames=12)
    with create_source(SourceConfig(url=f"{http_server}/a.mp4")) as source:
        assert (source.live, source.policy, source.frame_count) == (False, "block", 12)
        assert len(list(source)) == 12
