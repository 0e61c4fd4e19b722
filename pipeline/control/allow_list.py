"""AllowList: which source URLs may be added while a pipeline runs."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskcast.engines.errors import InputError
from maskcast.pipeline.url import is_device, local_path, redact, scheme, shorten

NETWORK_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp")

REMOTE_DEFAULT = ("rtsp:", "rtsps:", "test:")
"""Default rules for an endpoint that other users can reach: cameras, no local files."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#\\\s\x00-\x1f]*)(?=[/?#]|\Z)")
_HOST = re.compile(r"\[(?P<v6>[0-9A-Fa-f:.]+)\](?::\d+)?|(?P<name>[A-Za-z0-9.-]+)(?::\d+)?")


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule: a scheme, optionally limited to a network, a host or a path."""

    scheme: str
    network: _Network | None = None
    host: str = ""
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> _Rule:
        kind, colon, rest = text.partition(":")
        kind, rest = kind.lower(), rest.removeprefix("//")
        if text.startswith("/"):
            kind, colon, rest = "device" if is_device(text) else "file", ":", text
        if colon and kind in NETWORK_SCHEMES:
            return cls(kind) if not rest else cls._for_host(kind, rest, text)
        if colon and kind == "file" and rest.startswith("/"):
            return cls("file", path=Path(rest).resolve())
        if kind == "device" and colon and (not rest or is_device(rest)):
            return cls("device", path=Path(rest) if rest else None)
        if colon and kind in ("test", "udp", "screen") and not rest:
            return cls(kind)
        raise InputError(
            f"invalid rule {text[:100]!r}: use a scheme (rtsp:), a host or network "
            "(rtsp://192.168.0.0/16), a folder (file:/srv/clips), device:, screen: or test:"
        )

    @classmethod
    def _for_host(cls, kind: str, rest: str, text: str) -> _Rule:
        try:
            return cls(kind, network=ipaddress.ip_network(rest.strip("[]")))
        except ValueError:
            if re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", rest) and not _is_numeric(rest):
                return cls(kind, host=rest.lower())
        raise InputError(
            f"invalid rule {text[:100]!r}: use a host name, an IP address or a network without "
            "host bits, without port and path"
        )

    @property
    def is_unlimited(self) -> bool:
        """Whether every URL of the scheme matches."""
        return self.network is None and not self.host and self.path is None

    def matches(self, url: str) -> bool:
        match self.scheme:
            case "file":
                return _is_below(url, self.path)
            case "device":
                return is_device(url) and self.path in (None, local_path(url))
        if scheme(url) != self.scheme:
            return False
        return self.is_unlimited or self._matches_host(url)

    def _matches_host(self, url: str) -> bool:
        host = _host(url)
        if self.host:
            return host == self.host
        try:
            return ipaddress.ip_address(host) in self.network if self.network else False
        except ValueError:  # a name; it is not resolved, since its address may change before use
            return False


class AllowList:
    """Rules for URLs; a URL is allowed if one of them matches.

    ``rtsp:`` allows every URL of that scheme, ``rtsp://192.168.0.0/16`` and ``rtsp://cam.local``
    those of a network or host, ``file:/srv/clips`` the files below a folder (links are followed
    first), ``device:`` and ``device:/dev/video0`` V4L2 cameras, ``test:`` the test pattern. A
    network matches addresses only: a host name is allowed by a rule with that name.

    Args:
        rules: the rules; None allows everything.

    Raises:
        InputError: a rule is invalid.
    """

    def __init__(self, rules: Sequence[str] | None) -> None:
        self._texts = rules
        self._rules = None if rules is None else [_Rule.parse(rule) for rule in rules]

    def check(self, url: str) -> None:
        """Check a URL without accessing what it refers to.

        Raises:
            InputError: it is not allowed. The message is the same whether a file exists or not.
        """
        if self._rules is not None and not any(rule.matches(url) for rule in self._rules):
            allowed = ", ".join(self._texts or ()) or "none"
            raise InputError(
                f"{shorten(redact(url))}: not among the sources that may be added ({allowed}); "
                "extend control.allow in the configuration"
            )

    def is_confined(self, url: str) -> bool:
        """Tell whether a URL is allowed only because of its host, and may reach no other host."""
        return self._rules is not None and not any(
            rule.matches(url) and rule.is_unlimited for rule in self._rules
        )


def _is_below(url: str, folder: Path | None) -> bool:
    if scheme(url) not in ("", "file") or is_device(url) or folder is None:
        return False
    try:
        path = local_path(url).resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a null byte
        return False
    return path.is_relative_to(folder)


def _host(url: str) -> str:
    """Return a URL's host in lower case; "" if other programs might read another host."""
    authority = _AUTHORITY.match(url)
    found = _HOST.fullmatch(authority[1].rpartition("@")[2]) if authority else None
    return (found["v6"] or found["name"]).lower() if found else ""


def _is_numeric(host: str) -> bool:
    """Tell whether a host name would be read as an address: "127.1", "2130706433", "0x7f.1"."""
    return re.fullmatch(r"(0x[0-9a-f]*|\d+)", host.lower().rpartition(".")[2]) is not None
