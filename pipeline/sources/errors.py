"""Error messages for sources: one line with the cause of FFmpeg's error and what to do."""

from __future__ import annotations

import os
import socket

import av.error

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.files import is_fifo
from maskcast.pipeline.sources.source import AccessDeniedError
from maskcast.pipeline.url import host_and_port, is_device, is_local, local_path, redact, scheme

PROBE_TIMEOUT_S = 1.0
"""How long a camera's host may take to accept a TCP connection."""

PIPE_ADVICE = "send Matroska or MPEG-TS, because the index of an MP4 file is often at its end"

_TCP_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935}

_DENIED = (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)
_TIMEOUT = (av.error.ExitError, av.error.TimeoutError)
_NOT_FOUND = (av.error.HTTPNotFoundError, FileNotFoundError)


def opening_error(config: SourceConfig, error: Exception, waited_s: float) -> InputError:
    """Return the error to raise for a source that FFmpeg could not open.

    Args:
        config: the source.
        error: FFmpeg's error; its own text contains the URL with the password.
        waited_s: how long FFmpeg took.
    """
    kind = AccessDeniedError if isinstance(error, _DENIED) else InputError
    return kind(f"{redact(config.url)}: {_opening_problem(config, error, waited_s)}")


def reading_problem(config: SourceConfig, error: Exception) -> str:
    """Return why reading an open source failed, as one line without credentials."""
    if isinstance(error, _TIMEOUT):
        return f"{redact(config.url)}: no data for {config.read_timeout_s:g} s"
    return f"{redact(config.url)}: reading failed: {_reason(error)}{_index_advice(config.url)}"


def probe_tcp(url: str) -> None:
    """Check that the host of an RTSP or RTMP URL accepts connections; ignore other URLs.

    Raises:
        InputError: the host is unknown, it accepts no connection, or the URL is malformed.
    """
    if scheme(url) not in _TCP_PORTS:
        return
    problem = ""
    try:
        host, port = host_and_port(url)
        address = (host, port or _TCP_PORTS[scheme(url)])
        socket.create_connection(address, PROBE_TIMEOUT_S).close()
    except ConnectionRefusedError:
        problem = _REFUSED
    except socket.gaierror:
        problem = f"unknown host {host!r}; check the address and the name server"
    except TimeoutError:
        problem = f"no answer within {PROBE_TIMEOUT_S:g} s; check the address"
    except OSError as error:
        problem = f"{_reason(error)}; check the address and the network"
    except ValueError as error:
        problem = f"malformed URL: {error}; check the address"
    if problem:
        raise InputError(f"{redact(url)}: {problem}")


_REFUSED = "connection refused; check the address and that the server is running"


def _opening_problem(config: SourceConfig, error: Exception, waited_s: float) -> str:
    url = config.url
    if isinstance(error, _TIMEOUT) or (not is_local(url) and waited_s >= config.open_timeout_s):
        if scheme(url) == "udp":
            return f"no data within {config.open_timeout_s:g} s; check the sender and the port"
        return f"no answer within {config.open_timeout_s:g} s; check the address"
    if isinstance(error, ConnectionRefusedError):
        return _REFUSED
    if isinstance(error, _DENIED):
        return "access denied; give the right user and password in the URL"
    if isinstance(error, _NOT_FOUND):
        if is_device(url):
            return "no such camera; connect it, or list the cameras with `ls /dev/video*`"
        return "the server has nothing at this path; check the address"
    if isinstance(error, PermissionError):
        return "permission denied; allow this user to read it"
    if scheme(url) in (*_TCP_PORTS, "http", "https") and (problem := _network_problem(url)):
        return problem
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError | ValueError):
        if _is_mp4(url):
            return (
                "this MP4 file has no index (moov): the recording was cut off; repair it, or "
                "record to Matroska (.mkv), which can be read without its end"
            )
        if scheme(url).startswith("http"):
            return (
                "not a video that FFmpeg can read; give the URL of the stream itself, not of a "
                "web page"
            )
        if is_fifo(local_path(url)):
            return f"not a video that FFmpeg can read from a pipe; {PIPE_ADVICE}"
        return "not a video that FFmpeg can read; check with another player that it is complete"
    return f"cannot be opened: {_reason(error)}{_index_advice(config.url)}"


def _network_problem(url: str) -> str:
    """Return why a host is unreachable, "" if it is reachable; FFmpeg's errors do not say."""
    try:
        host, port = host_and_port(url)
        socket.getaddrinfo(host, port)
        probe_tcp(url)
    except socket.gaierror:
        return f"unknown host {host!r}; check the address and the name server"
    except InputError as error:
        return str(error).removeprefix(f"{redact(url)}: ")
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _index_advice(url: str) -> str:
    """Return advice for an MP4 over HTTP, whose index may be at its end; "" for other sources."""
    path = url.partition("?")[0].lower()
    if not scheme(url).startswith("http") or not path.endswith((".mp4", ".mov", ".m4v")):
        return ""
    return (
        "; if the server cannot send parts of a file (range requests), move the file's index to "
        "its start: ffmpeg -i IN -c copy -movflags +faststart OUT"
    )


def _is_mp4(url: str) -> bool:
    if not is_local(url) or not local_path(url).is_file():  # opening a pipe would block
        return False
    try:
        with local_path(url).open("rb") as file:
            return file.read(8)[4:] == b"ftyp"
    except OSError:
        return False


def _reason(error: Exception) -> str:
    code = getattr(error, "errno", None)
    text = getattr(error, "strerror", None) or (os.strerror(code) if code else "")
    return text[:1].lower() + text[1:] if text else type(error).__name__
