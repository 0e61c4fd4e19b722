import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.url import (
    MAX_SHOWN_LENGTH,
    MAX_URL_LENGTH,
    host_and_port,
    is_device,
    is_local,
    redact,
    scheme,
    shorten,
    source_name,
)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://admin:secret@10.0.0.1:554/stream", "rtsp://***@10.0.0.1:554/stream"),
        ("rtsp://admin:p@ss/w0rd@10.0.0.1/stream", "rtsp://***@10.0.0.1/stream"),
        ("rtsp://admin:12/34@cam/stream", "rtsp://***@cam/stream"),
        ("rtsp://admin:a b?c#d@cam/stream", "rtsp://***@cam/stream"),
        ("rtsp://token@cam/stream", "rtsp://***@cam/stream"),
        ("http://host:80/video?width=4&token=a/b==&fps=3", "http://host:80/video?width=4&token=***&fps=3"),
        ("rtsp://cam:554/user=admin_password=x_channel=1.sdp", "rtsp://cam:554/user=***"),
        ("http://cam/cgi?loginuse=a&loginpas=b", "http://cam/cgi?loginuse=***&loginpas=***"),
    ],
)  # fmt: skip
def test_credentials_are_hidden(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://10.0.0.1:8554/stream",
        "http://host/@user/clip.mp4",
        "http://host/video?resolution=640x480",
        "test://1280x720@30",
        "udp://@239.0.0.1:5000",
        "/data/my video @ home.mp4",
        "/dev/video0",
    ],
)
def test_an_address_without_credentials_is_shown_whole(url: str) -> None:
    assert redact(url) == url


@settings(max_examples=200)
@given(
    user=st.text(st.characters(codec="ascii", exclude_characters="*"), min_size=1),
    password=st.text(st.characters(codec="ascii", exclude_characters="*"), min_size=1),
)
def test_everything_before_the_host_is_hidden(user: str, password: str) -> None:
    assert redact(f"rtsp://{user}:{password}@camera/live") == "rtsp://***@camera/live"


def test_a_url_in_a_text_that_is_cut_is_hidden_in_full() -> None:
    password = "x" * MAX_URL_LENGTH
    assert redact(f"cannot open rtsp://admin:{password}@camera/live") == ("cannot open rtsp://***…")
    assert redact("a" * (MAX_URL_LENGTH + 1)) == "a" * MAX_URL_LENGTH + "…"


def seconds(text: str) -> float:
    """Return the least processor time of some runs; other work on the machine only adds to it."""
    times_s = []
    for _ in range(7):
        began_s = time.thread_time()
        for _ in range(20):
            redact(text)
        times_s.append(time.thread_time() - began_s)
    return min(times_s)


@pytest.mark.parametrize(
    "part", ["x", "pas", "x=", "pas=", "http://pas", "http://a@", "=pas&", "test://", "a b", "://"]
)
def test_the_time_grows_with_the_length_and_not_with_its_square(monkeypatch, part: str) -> None:
    monkeypatch.setattr("maskcast.pipeline.url.MAX_URL_LENGTH", 1 << 20)
    small, large = part * 1_000, part * 16_000
    # 16 times the length: 16 times the time if linear, 256 times if quadratic, 4096 if cubic.
    assert seconds(large) < 64 * seconds(small)


def test_a_shown_text_is_one_line_of_bounded_length() -> None:
    assert shorten("a\nb  c") == "a b c"
    assert len(shorten("x" * 10_000)) == MAX_SHOWN_LENGTH


def test_a_host_and_port_are_found_behind_any_password() -> None:
    assert host_and_port("rtsp://cam/x") == ("cam", None)
    assert host_and_port("rtsp://admin:a/b?c#d@[::1]:8554/x?y=1") == ("::1", 8554)


@pytest.mark.parametrize("url", ["rtsp:///cam", "rtsp://cam:99999/x", "rtsp://[::1/x", "http://"])
def test_a_malformed_host_or_port_is_an_error(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - urlsplit's own texts differ
        host_and_port(url)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/data/My Video.mp4", "My-Video"),
        ("frames/", "frames"),
        ("file:///data/clip.mkv", "clip"),
        ("/dev/video0", "video0"),
        ("rtsp://admin:secret@cam-1.local:554/stream", "cam-1.local-stream"),
        ("rtsp://10.0.0.9/Streaming/Channels/101", "10.0.0.9-Streaming-Channels-101"),
        ("rtsp://cam:554/user=admin_password=x_channel=1.sdp", "cam"),
        ("rtsp://cam/", "cam"),
        ("https://example.com/a/clip.mp4?sig=1", "clip"),
        ("http://cam/mjpeg?user=a", "cam"),
        ("rtmp://server/live/cam", "server-live-cam"),
        ("udp://@239.0.0.1:5000?ttl=2", "udp-5000"),
        ("screen://:0", "screen"),
        ("-", "stdin"),
        ("test://1280x720@30", "test"),
        ("..", "source"),
    ],
)
def test_a_source_is_named_after_its_address(url: str, name: str) -> None:
    assert source_name(url) == name


@given(st.text())
def test_any_name_is_legal_in_a_topic(url: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source_name(url))


def test_the_scheme_of_a_path_is_empty() -> None:
    assert scheme("clips/a.mp4") == ""
    assert scheme("RTSP://cam/x") == "rtsp"


def test_a_device_is_neither_local_file_nor_remote() -> None:
    assert is_device("/dev/video0")
    assert not is_local("/dev/video0")
    assert is_local("clip.mp4")
    assert not is_local("rtsp://cam/x")
