"""Source addresses: what they point to, what may be shown of them, and names made from them."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

_HIDDEN = "***"

_SCHEME_AND_REST = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?<!test://)(?P<rest>.*)", re.DOTALL
)

_SECRET_PARAMETER = re.compile(
    r"(?P<name>[^=&;?/#\s]*"
    r"(?:pas|pwd|psw|token|key|secret|auth|sig|cred|user|usr|login|jwt|sid|session)"
    r"[^=&;?/#\s]*)=[^&]*",
    re.IGNORECASE,
)

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


def redact(url: str) -> str:
    """Return a URL without its credentials.

    The user part (``user:password@``) and the values of parameters that are named like secrets
    (``?token=``, and cameras' ``/user=admin_password=…``) become ``***``. A password may hold an
    unescaped ``/``, ``?``, ``@`` or blank, so where the address could be read in two ways more is
    hidden, never less. In a text with a URL in it, what follows the URL may be hidden too.
    """
    shown = _SCHEME_AND_REST.sub(lambda match: match["scheme"] + _without_user(match["rest"]), url)
    return _SECRET_PARAMETER.sub(lambda match: f"{match['name']}={_HIDDEN}", shown)


def _without_user(rest: str) -> str:
    user, at, address = rest.rpartition("@")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{_HIDDEN}@{address}" if at and (":" in user or "@" in authority) else rest


def scheme(url: str) -> str:
    """Return the scheme in lower case, or "" for a path of this machine."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return match[1].lower() if match else ""


def is_local(url: str) -> bool:
    """Tell whether an address is of this machine: a file or a folder, but no device."""
    return scheme(url) in ("", "file") and not is_device(url)


def is_device(url: str) -> bool:
    """Tell whether an address is a V4L2 camera."""
    return re.fullmatch(r"(file://)?/dev/video\d+", url) is not None


def local_path(url: str) -> Path:
    """Return the path of a file on this machine."""
    return Path(url.removeprefix("file://"))


def source_name(url: str) -> str:
    """Return a short name for a source: a file's stem, a camera's host, a device's node.

    It holds only what is legal in a topic (``A-Z a-z 0-9 . _ -``) and no credentials.
    """
    kind = scheme(url)
    if kind == "test":
        return "test"
    if kind in ("", "file"):
        path = PurePath(url.removeprefix("file://"))
        name = path.name if url.startswith("/dev/") or not path.stem else path.stem
    else:
        address = redact(url).partition("://")[2].removeprefix(f"{_HIDDEN}@")
        host, _, path_part = re.split(r"[?#]", address, maxsplit=1)[0].partition("/")
        file = PurePath(path_part)
        is_file = kind.startswith("http") and file.suffix and _HIDDEN not in path_part
        name = file.stem if is_file else re.sub(r":\d+$", "", host)
    return _NOT_IN_A_NAME.sub("-", name).strip("-._") or "source"
