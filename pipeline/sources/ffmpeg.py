"""FFmpeg arguments for opening a source: address, format, options and decode device."""

from __future__ import annotations

import ipaddress
import os
import re
from functools import cache

import av.error
from av.codec import Codec
from av.codec.hwaccel import HWAccel, hwdevices_available

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import DecodeDevice, SourceConfig
from maskcast.pipeline.url import host_and_port, is_device, is_local, local_path, redact, scheme

_ANALYSIS_US = 250_000
"""Limit of FFmpeg's analysis before the first frame, by default 1 s for RTSP and 5 s for RTMP. The
SDP and the first packets describe the stream well enough."""

_PROTOCOLS = {
    "": "file,crypto,data",
    "file": "file,crypto,data",
    "http": "http,https,tcp,tls,crypto,httpproxy,data",
    "https": "http,https,tcp,tls,crypto,httpproxy,data",
    "rtsp": "rtsp,rtp,rtcp,srtp,udp,tcp,tls",
    "rtsps": "rtsp,rtsps,rtp,rtcp,srtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "udp": "udp",
}
"""Protocols that FFmpeg may use, by the scheme of the URL. A playlist or redirect from the network
cannot read local files, and a local file cannot access the network."""

_DEVICE_OPTIONS: dict[DecodeDevice, dict[str, object]] = {"cuda": {"primary_ctx": "1"}}
"""All sources and the engine share one CUDA context; each context takes several hundred MB."""


def screen_name(url: str) -> str:
    """Return the X11 display in a URL like ``screen://:0``, or ``$DISPLAY`` for ``screen://``.

    Raises:
        InputError: the URL has no valid display, or ``$DISPLAY`` is not set.
    """
    name = url.partition("://")[2] or os.environ.get("DISPLAY", "")
    if not re.fullmatch(r"[A-Za-z0-9.-]*:\d+(\.\d+)?", name):
        problem = f"{name!r} is not an X11 display" if name else "$DISPLAY is not set"
        raise InputError(f"{redact(url)}: {problem}; give one, for example screen://:0")
    return name


def ffmpeg_address(url: str) -> str:
    """Return the address for FFmpeg, which would take ``a:b.mp4`` for a URL of protocol ``a``."""
    if is_device(url):
        return str(local_path(url))
    if scheme(url) == "screen":
        return screen_name(url)
    return f"file:{local_path(url)}" if is_local(url) else url


def ffmpeg_format(url: str) -> str | None:
    """Return the input format for a URL; None if FFmpeg detects it."""
    if is_device(url):
        return "v4l2"
    return "x11grab" if scheme(url) == "screen" else None


def ffmpeg_options(config: SourceConfig) -> dict[str, str]:
    """Return the options with which FFmpeg opens a source."""
    kind = scheme(config.url)
    options = {"protocol_whitelist": _PROTOCOLS.get(kind, "")}
    if kind.startswith("rtsp"):
        options["rtsp_transport"] = config.rtsp_transport
    if kind.startswith("rtsp") or kind == "rtmp":
        options["analyzeduration"] = str(_ANALYSIS_US)
    if kind == "udp":
        options["overrun_nonfatal"] = "1"  # on an overrun, lose packets instead of the connection
        host, _ = host_and_port(config.url)
        if not _is_multicast(host):
            options["localaddr"] = host  # otherwise FFmpeg listens on every interface
    return options


def _is_multicast(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_multicast
    except ValueError:
        return False


def decode_device(config: SourceConfig, engine_device: DecodeDevice | None) -> DecodeDevice | None:
    """Return the configured decode device; ``auto`` is the engine's. None is software."""
    match config.decode:
        case "auto":
            return engine_device
        case "software":
            return None
        case device:
            return device


def accelerator(device: DecodeDevice) -> HWAccel:
    """Return the ``hwaccel`` argument with which ``av.open`` decodes on a device.

    Frames are copied to host memory. FFmpeg decodes in software what the device does not support.
    """
    return HWAccel(device, allow_software_fallback=True, options=_DEVICE_OPTIONS.get(device))


@cache
def device_problem(device: DecodeDevice) -> str:
    """Return why a device cannot be opened, "" if it can. The first result is cached."""
    return open_device(device)


def open_device(device: DecodeDevice) -> str:
    """Open a device and close it again. Return why that failed, "" if it succeeded."""
    if device not in hwdevices_available():
        return f"PyAV's FFmpeg is built without {device}"
    try:
        accelerator(device).create(Codec("h264", "r"))
    except NotImplementedError:
        return f"PyAV's FFmpeg is built without {device}"
    except (av.error.FFmpegError, OSError) as error:
        if device == "cuda" and isinstance(error, PermissionError):
            return "libcuda.so.1 cannot be loaded: there is no NVIDIA driver"
        return f"the device cannot be opened: {error.strerror}"
    return ""
