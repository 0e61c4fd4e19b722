"""Access: who may see the page, by address, token, Host and Origin."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from maskcast.engines.errors import InputError
from maskcast.pipeline.address import is_loopback_host

MIN_TOKEN_LENGTH = 12


class Access:
    """Decides who may see the page.

    Without a token, every program on this machine may see it, but only under a host name of this
    machine. This stops DNS rebinding, where a page of an attacker connects under its own name. With
    a token, any name is accepted, because such a page does not know the token.

    Args:
        host: the host that is bound; "" for every interface.
        token: what a browser must send; None is possible on loopback only.

    Raises:
        InputError: other machines could connect without a token, or the token is too short.
    """

    def __init__(self, host: str, token: str | None) -> None:
        if token is not None and len(token) < MIN_TOKEN_LENGTH:
            raise InputError(
                f"invalid token: shorter than {MIN_TOKEN_LENGTH} characters; make one with: "
                "openssl rand -hex 16"
            )
        if token is None and not is_loopback_host(host):
            raise InputError(
                f"serving the view on {host or '*'} needs a token, because other machines can "
                "connect; set --token or MASKCAST_VIEW_TOKEN, or serve on 127.0.0.1"
            )
        self._token = token
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}

    @property
    def needs_token(self) -> bool:
        """Whether a browser must send a token."""
        return self._token is not None

    def admits_host(self, host: str) -> bool:
        """Whether a request with this Host header is answered."""
        return self._token is not None or _hostname(host) in self._names

    def admits_origin(self, origin: str | None, host: str) -> bool:
        """Whether a page of this Origin may connect. Programs other than browsers send none."""
        return origin is None or _address(origin) == host.lower()

    def admits_token(self, token: str) -> bool:
        """Whether this is the token, compared in constant time."""
        return self._token is None or hmac.compare_digest(token.encode(), self._token.encode())


def _address(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
