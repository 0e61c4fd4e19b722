from __future__ import annotations

from pathlib import Path

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.control.allow_list import REMOTE_DEFAULT, AllowList


def is_allowed(url: str, *rules: str) -> bool:
    try:
        AllowList(rules).check(url)
    except InputError:
        return False
    return True


def test_without_rules_everything_is_allowed_and_with_none_of_them_nothing() -> None:
    AllowList(None).check("file:///etc/passwd")
    assert not is_allowed("rtsp://10.0.0.1/1")
    assert not is_allowed("clip.mp4")


def test_the_default_for_remote_clients_is_cameras_only() -> None:
    for url in ("rtsp://user:pw@10.0.0.1/1", "RTSPS://cam.local:322/1", "test://8x8@1"):
        assert is_allowed(url, *REMOTE_DEFAULT), url
    for url in ("clip.mp4", "/dev/video0", "file:///etc/passwd", "http://10.0.0.1/", "gopher://x"):
        assert not is_allowed(url, *REMOTE_DEFAULT), url


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://192.168.7.9/stream",
        "rtsp://192.168.7.9:8554",
        "rtsp://user:p@ss@192.168.7.9/stream?x=@1.2.3.4",
        "rtsp://192.168.255.255#1.2.3.4",
    ],
)
def test_a_network_allows_its_addresses(url: str) -> None:
    assert is_allowed(url, "rtsp://192.168.0.0/16")


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://192.169.0.1/",
        "rtsp://cam.local/",
        "rtsp://192.168.7.9@1.2.3.4/",
        "rtsp://1.2.3.4/@192.168.7.9",
        "rtsp://1.2.3.4?@192.168.7.9",
        "rtsp://1.2.3.4#@192.168.7.9",
        "rtsp://1.2.3.4\\@192.168.7.9/",
        "rtsp:// 192.168.7.9/",
        "rtsp://192.168.7.9\t/",
        "rtsp://192.168.7.9:port/",
        "rtsp://192.168.7.9%00.evil/",
        "rtsp://192.168.1801",
        "rtsp://0xc0.0xa8.0.1/",
        "rtsp://[::ffff:192.168.7.9]/",
        "rtsp:///",
        "rtsps://192.168.7.9/",
        "http://192.168.7.9/",
        "rtsp:192.168.7.9",
    ],
)
def test_what_is_not_surely_in_a_network_is_refused(url: str) -> None:
    assert not is_allowed(url, "rtsp://192.168.0.0/16")


def test_hosts_are_allowed_by_name_and_address() -> None:
    assert is_allowed("http://Cam.Local:8080/mjpeg", "http://cam.local")
    assert not is_allowed("http://cam.local.evil.example/", "http://cam.local")
    assert not is_allowed("http://evil.example/cam.local", "http://cam.local")
    assert is_allowed("rtsp://[FE80::1]:554/1", "rtsp://[fe80::1]")
    assert is_allowed("rtsp://[2001:db8::7]/1", "rtsp://2001:db8::/32")
    assert not is_allowed("rtsp://[2001:db9::7]/1", "rtsp://2001:db8::/32")


def test_a_folder_allows_the_files_below_it_once_links_are_followed(tmp_path: Path) -> None:
    clips, other = tmp_path / "clips", tmp_path / "other"
    (clips / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "secret.mp4").touch()
    (clips / "link.mp4").symlink_to(other / "secret.mp4")
    (clips / "loop.mp4").symlink_to(clips / "loop.mp4")
    (tmp_path / "alias").symlink_to(clips)
    rule = f"file:{clips}"
    for path in (clips, clips / "a.mp4", clips / "sub/a.mp4", tmp_path / "alias/a.mp4"):
        assert is_allowed(str(path), rule), path
        assert is_allowed(f"file://{path}", rule), path
    for path in (
        *(other / "secret.mp4", other / "absent.mp4", clips / "../other/secret.mp4"),
        *(clips / "link.mp4", f"{clips}-2/a.mp4", f"{clips}/a\0.mp4", "/etc/passwd"),
    ):
        assert not is_allowed(str(path), rule), path
    assert not is_allowed(f"test://{clips}", rule)
    AllowList([rule, str(other), f"file://{other}"])


def test_streams_and_the_screen_are_allowed_by_their_schemes() -> None:
    assert is_allowed("udp://0.0.0.0:5000", "udp:")
    assert is_allowed("screen://:0", "screen:")
    assert is_allowed("rtmp://10.0.0.9/live/cam", "rtmp://10.0.0.0/8")
    assert not is_allowed("rtmp://11.0.0.9/live/cam", "rtmp://10.0.0.0/8")
    assert not is_allowed("udp://0.0.0.0:5000", "rtsp:", "screen:")


def test_devices_are_allowed_one_by_one_or_all() -> None:
    assert is_allowed("/dev/video1", "device:")
    assert is_allowed("file:///dev/video1", "/dev/video1")
    assert not is_allowed("/dev/video0", "device:/dev/video1")
    assert not is_allowed("/dev/video0", "file:/dev")
    assert not is_allowed("/dev/zero", "device:")


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "rtsp",
        "rtsp//cam",
        "gopher:",
        "file:",
        "file:clips",
        "rtsp://192.168.0.1/16",
        "rtsp://cam.local:554",
        "rtsp://cam.local/stream",
        "rtsp://127.1",
        "device:/dev/zero",
        "test://8x8@1",
    ],
)
def test_a_rule_that_cannot_be_understood_is_refused(rule: str) -> None:
    with pytest.raises(InputError, match="invalid rule"):
        AllowList([rule])


def test_a_refusal_shows_neither_credentials_nor_long_urls() -> None:
    with pytest.raises(InputError) as caught:
        AllowList(["test:"]).check("http://admin:hunter2@host/" + "x" * 10_000)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value)) < 1000
