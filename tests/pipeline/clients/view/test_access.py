"""Access to the page: hosts, origins and the token."""

from __future__ import annotations

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients.view.access import Access

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize("host", ["", "0.0.0.0", "192.168.0.5", "::", "camera-host"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(InputError, match=r"needs a token, .*; set --token or MASKCAST_VIEW_TOKEN"):
        Access(host, None)
    assert Access(host, TOKEN).needs_token


def test_a_short_token_is_refused() -> None:
    with pytest.raises(InputError, match="openssl rand"):
        Access("127.0.0.1", "short")
    with pytest.raises(InputError, match="openssl rand"):
        Access("0.0.0.0", "")


def test_without_a_token_only_names_of_this_machine_are_answered() -> None:
    access = Access("127.0.0.1", None)
    for host in ("127.0.0.1:8080", "localhost:9", "LOCALHOST", "[::1]:8080"):
        assert access.admits_host(host), host
    for host in ("", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "[x"):
        assert not access.admits_host(host), host


def test_pages_of_other_origins_may_not_connect() -> None:
    access = Access("127.0.0.1", None)
    assert access.admits_origin("http://127.0.0.1:8080", "127.0.0.1:8080")
    assert access.admits_origin("https://Camera.example", "camera.example")
    assert access.admits_origin(None, "127.0.0.1:8080")
    for origin in (
        "http://evil.example",
        "http://127.0.0.1:8081",
        "null",
        "file://",
        "",
        "http://[x",
    ):
        assert not access.admits_origin(origin, "127.0.0.1:8080"), origin


def test_only_the_exact_token_is_accepted() -> None:
    access = Access("0.0.0.0", TOKEN)
    assert access.admits_token(TOKEN)
    for wrong in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ä"):
        assert not access.admits_token(wrong)
    assert Access("127.0.0.1", None).admits_token("")
