"""Source URLs: what they point to, what may be shown of them, and names made from them."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from urllib.parse import urlsplit

MAX_URL_LENGTH = 2048
"""Maximum length of a URL, characters."""

MAX_SHOWN_LENGTH = 500
"""Maximum length, characters, of an external text in a message, a log line or a table."""

_HIDDEN = "***"

_SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])(?!(?i:test)://)[A-Za-z0-9+.-]*+://")
"""Possessive, and only from the start of a word: the search is linear in the length of the text."""

_PARAMETER_NAME = re.compile(r"(?<![^=&;?/#\s])[^=&;?/#\s]++=")

_SECRET_WORD = re.compile(
    r"pas|pwd|psw|token|key|secret|auth|sig|cred|user|usr|login|jwt|sid|session", re.IGNORECASE
)

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")

STDIN = "-"

_LIVE_SCHEMES = frozenset({"http", "https", "rtsp", "rtsps", "rtmp", "udp", "screen"})


def redact(text: str) -> str:
    """Return a URL, or a text with a URL in it, without credentials.

    The user part (``user:password@``) and the values of parameters with names like those of secrets
    (``?token=``, and the ``/user=admin_password=…`` of some cameras) become ``***``. A password may
    contain an unescaped ``/``, ``?``, ``@`` or space, so an ambiguous URL is hidden in full. What
    follows a URL in a text may be hidden too.

    The time is linear in the length of the text. A text longer than ``MAX_URL_LENGTH`` is cut, and
    a URL in it is hidden in full, because the "@" after its password may have been cut off.
    """
    is_cut = len(text) > MAX_URL_LENGTH
    text = text[:MAX_URL_LENGTH]
    if found := _SCHEME.search(text):
        rest = _HIDDEN if is_cut else _without_user(text[found.end() :])
        text = text[: found.end()] + rest
    return _without_secret_parameters(text) + ("…" if is_cut else "")


def shorten(text: str) -> str:
    """Return a text on one line, cut at ``MAX_SHOWN_LENGTH`` characters.

    Redact the text first: a cut URL cannot be redacted reliably.
    """
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN_LENGTH else f"{line[: MAX_SHOWN_LENGTH - 1]}…"


def _without_user(rest: str) -> str:
    user, _, address = rest.rpartition("@")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{_HIDDEN}@{address}" if user and (":" in user or "@" in authority) else rest


def _without_secret_parameters(text: str) -> str:
    parts, done = [], 0
    while name := _PARAMETER_NAME.search(text, done):
        parts.append(text[done : name.end()])
        done = name.end()
        if _SECRET_WORD.search(name[0]):
            end = text.find("&", done)
            done = len(text) if end < 0 else end
            parts.append(_HIDDEN)
    return "".join([*parts, text[done:]])


def scheme(url: str) -> str:
    """Return the scheme in lower case, or "" for a path on this machine."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return match[1].lower() if match else ""


def is_local(url: str) -> bool:
    """Tell whether a URL names a file or folder on this machine, not a device."""
    return scheme(url) in ("", "file") and not is_device(url)


def is_device(url: str) -> bool:
    """Tell whether a URL names a V4L2 camera."""
    return re.fullmatch(r"(file://)?/dev/video\d+", url) is not None


def is_endless(url: str) -> bool:
    """Tell whether a URL names a camera, a screen or a stream, which runs until it is stopped.

    An HTTP URL counts as a stream, although it may turn out to be a finite video.
    """
    return scheme(url) in _LIVE_SCHEMES or is_device(url)


def local_path(url: str) -> Path:
    """Return the path of a file on this machine; for "-", the path of standard input."""
    return Path("/dev/stdin" if url == STDIN else url.removeprefix("file://"))


def host_and_port(url: str) -> tuple[str, int | None]:
    """Return the host of a network URL, and its port, None where the URL does not give one.

    Raises:
        ValueError: there is no host, or the port is not a number from 0 to 65535.
    """
    address = urlsplit(redact(url))  # a password may contain characters that end the host
    if not address.hostname:
        raise ValueError("the host is missing")
    try:
        return address.hostname, address.port
    except ValueError:
        raise ValueError("the port is not a number from 0 to 65535") from None


def source_name(url: str) -> str:
    """Return a short name for a source.

    A file is named by its stem, a device by its node, an RTSP or RTMP stream by its host and path
    (``nvr-Streaming-Channels-101``), an HTTP stream by its file's stem or its host, a UDP stream by
    its port. The name contains only what is legal in a topic (``A-Z a-z 0-9 . _ -``) and no
    credentials.
    """
    kind = scheme(url)
    if kind in ("test", "screen"):
        return kind
    if url == STDIN:
        return "stdin"
    if kind == "udp":  # it listens on a port of this machine
        port = re.search(r":(\d{1,5})(?=[/?#]|\Z)", url)
        return f"udp-{port[1]}" if port else "udp"
    if kind in ("", "file"):
        path = PurePath(url.removeprefix("file://"))
        name = path.name if url.startswith("/dev/") or not path.stem else path.stem
    else:
        address = redact(url).partition("://")[2].removeprefix(f"{_HIDDEN}@")
        host, _, path_part = re.split(r"[?#]", address, maxsplit=1)[0].partition("/")
        file = PurePath(path_part)
        host = re.sub(r":\d+$", "", host)
        has_secret = _HIDDEN in path_part
        if kind.startswith("http"):
            name = file.stem if file.suffix and not has_secret else host
        else:
            name = host if has_secret else f"{host}/{path_part}"
    return _NOT_IN_A_NAME.sub("-", name).strip("-._") or "source"
