"""Addresses of HTTP servers."""

from __future__ import annotations

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.address import is_loopback_host, split_address


def split(address: str) -> tuple[str, int]:
    return split_address(address, "metrics", "127.0.0.1:9100")


def test_addresses_of_both_families_are_split() -> None:
    assert split("127.0.0.1:9100") == ("127.0.0.1", 9100)
    assert split("[::1]:9100") == ("::1", 9100)
    assert split("localhost:0") == ("localhost", 0)
    assert split("*:9100") == split(":9100") == ("", 9100)


@pytest.mark.parametrize(
    "address", ["", "9100", "127.0.0.1", "host:", "host:99999", "host:-1", "::1:9100", "a/b:1"]
)
def test_an_invalid_address_is_named(address: str) -> None:
    with pytest.raises(InputError, match=r"invalid address for metrics .*: use HOST:PORT"):
        split(address)


def test_only_this_machine_reaches_loopback_hosts() -> None:
    assert all(map(is_loopback_host, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback_host, ["", "0.0.0.0", "::", "192.168.0.5", "localhost.evil"]))
