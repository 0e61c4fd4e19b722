"""Config: the configuration of a pipeline, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
)

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from maskcast.pipeline.configuration.quantities import parse_bytes, parse_seconds
from maskcast.pipeline.configuration.zones import LineConfig, ZoneConfig, check_regions
from maskcast.pipeline.url import MAX_URL_LENGTH, redact, source_name
from maskcast.pipeline.wire.message import MaskFormat

T = TypeVar("T")

VIDEO_SUFFIXES = (".mp4", ".mkv")
"""File suffixes that ``outputs.save`` may have."""

Policy = Literal["latest", "block"]
"""What a full inbox does: replace the frame that waits, or let the source wait."""

DecodeDevice = Literal["cuda", "vaapi"]
"""Hardware that decodes video: NVDEC of an NVIDIA GPU, or VA-API."""

DECODE_DEVICES: tuple[DecodeDevice, ...] = get_args(DecodeDevice)

SourceName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class SourceConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One source of frames.

    Attributes:
        url: a video, an image, a folder of either, ``-`` (standard input), ``http(s)://``,
            ``rtsp(s)://``, ``rtmp://``, ``udp://``, ``/dev/videoN``, ``screen://`` or
            ``test://WIDTHxHEIGHT@FPS`` (docs/sources.md).
        name: its name in topics and tables; made from ``url`` if absent.
        policy: ``latest`` (a newer frame replaces a waiting one; files play at their own frame
            rate) or ``block`` (the source waits, and no frame is lost). The default is ``latest``
            for live sources and ``block`` for files.
        every_nth: process only the first of every N frames.
        max_fps: process at most this many frames per second.
        fps: frame rate of a folder of images, 25 by default; not for other sources.
        loop: start a file again when it ends.
        decode: the video decoder: ``software``, ``cuda`` (NVDEC) or ``vaapi``; ``software`` if the
            device is absent. ``auto`` is ``cuda`` if the engine runs on an NVIDIA GPU, otherwise
            ``software`` (docs/sources.md).
        rtsp_transport: RTSP transport; ``udp`` starts faster, but lost packets damage frames.
        open_timeout_s: maximum time to open the source, seconds.
        read_timeout_s: reconnect a live source after this many seconds without data.
        track: give instances track ids; on by default for video, off for images without zones and
            lines.
        zones: polygons that instances enter and leave (docs/tracking.md).
        lines: lines that instances cross.
        required: whether ``/healthz`` reports 503 while this source does not stream, and whether a
            file that does not exist or a malformed URL is an error before the run starts.
    """

    url: Annotated[str, Meta(min_length=1, max_length=MAX_URL_LENGTH)]
    name: SourceName | None = None
    policy: Policy | None = None
    every_nth: Count = 1
    max_fps: Annotated[float, Meta(ge=0.001, le=1000)] | None = None
    fps: Annotated[float, Meta(ge=0.001, le=1000)] | None = None
    loop: bool = False
    decode: Literal["auto", "software", "cuda", "vaapi"] = "auto"
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    open_timeout_s: Seconds = 10.0
    read_timeout_s: Seconds = 5.0
    track: bool | None = None
    zones: tuple[ZoneConfig, ...] = ()
    lines: tuple[LineConfig, ...] = ()
    required: bool = True

    def __post_init__(self) -> None:
        check_regions(self.zones, self.lines)
        if self.track is False and (self.zones or self.lines):
            raise ValueError("zones and lines need tracks; remove 'track: false'")

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = {field: getattr(self, field) for field in self.__struct_fields__}
        return list((shown | {"url": redact(self.url)}).items())

    def __repr__(self) -> str:
        fields = ", ".join(f"{field}={value!r}" for field, value in self.__rich_repr__())
        return f"SourceConfig({fields})"


class ConfinedSourceConfig(SourceConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A source that is allowed only because of its host (``AllowList.is_confined``).

    Its HTTP requests reach the host of its URL and no other (``HostProxy``).
    """


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model and the engine that runs it.

    Attributes:
        bundle: a bundle's folder, or ``default`` for the model that ships with maskcast.
        engine: the inference library; ``auto`` is the one that the bundle was built for.
        mode: what the engine optimises for: ``latency`` (all cores work on one frame) or
            ``throughput`` (one core per frame); ``auto`` is ``throughput`` if no source is live.
        score_threshold: minimum score of a reported instance; the bundle's own by default.
        classes: names of the classes to report; all by default.
        pose: estimate the keypoints of each instance; the bundle must have a poser.
        spin: wait for a GPU in a busy loop instead of asleep: shorter waits, at the cost of a core
            for each of the two threads that wait (docs/tensorrt.md). CPU engines ignore it.
    """

    bundle: Annotated[str, Meta(min_length=1)] = "default"
    engine: Literal["auto", "openvino", "onnxruntime", "tensorrt"] = "auto"
    mode: Literal["auto", "latency", "throughput"] = "auto"
    score_threshold: Annotated[float, Meta(ge=0, le=1)] | None = None
    classes: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    pose: bool = False
    spin: bool = False


class CurveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Encryption with CURVE: only clients whose keys are allowed can subscribe.

    Attributes:
        secret_key: the publisher's ``.key_secret`` file, made by ``maskcast keys new``.
        allowed_clients: a folder of subscribers' ``.key`` files, or a list of files and folders,
            each key with a rights file next to it (docs/operations.md); needed unless there are
            ``gateways``.
        gateway_key: the ``.key`` file of the ``gateways``, needed with them.
    """

    secret_key: Annotated[str, Meta(min_length=1)]
    allowed_clients: Annotated[str, Meta(min_length=1)] | tuple[str, ...] | None = None
    gateway_key: Annotated[str, Meta(min_length=1)] | None = None


class PublishConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where and how messages are published.

    Attributes:
        endpoint: the ZeroMQ endpoint to bind; not bound if there are ``gateways``.
        gateways: connect to these gateways instead of binding; subscribers connect to them.
        masks: the format of the masks in messages.
        jpeg_quality: add each frame's image as JPEG of this quality; no image by default.
        high_water_mark: messages queued for each subscriber; a slower one loses messages.
        wait_subscribers: start the sources when each has this many subscribers; behind a gateway,
            those with the same subscription count as one.
        curve: encryption keys; by default anyone who can connect can subscribe.
    """

    endpoint: Annotated[str, Meta(min_length=1)] = "tcp://127.0.0.1:5555"
    gateways: tuple[str, ...] = ()
    masks: MaskFormat = "crop_u8"
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] | None = None
    high_water_mark: Count = 256
    wait_subscribers: Annotated[int, Meta(ge=0)] = 0
    curve: CurveConfig | None = None

    def __post_init__(self) -> None:
        if self.curve is None:
            return
        if self.gateways and self.curve.gateway_key is None:
            raise ValueError("curve.gateway_key: missing; give the .key file of the gateways")
        if not self.gateways and self.curve.allowed_clients is None:
            raise ValueError("curve.allowed_clients: missing; give the subscribers' .key files")


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files to write (docs/outputs.md).

    Attributes:
        save: annotated video to write, ``.mp4`` or ``.mkv``; the name may contain a time:
            ``cam-%Y%m%d-%H%M%S.mp4``.
        jsonl: JSON lines to write, one object per frame; the name may contain a time, ``-`` is
            standard output.
        append: add lines to an existing JSONL file instead of replacing it.
        segment: start new files after this time: ``30s``, ``10m``, ``1h``, ``1d``.
        segment_size: start new files at this size: ``500kB``, ``500MB``, ``2GB``.
        trail_s: draw the path of each track in ``save``, this many seconds long; none if absent.
    """

    save: str | None = None
    jsonl: str | None = None
    append: bool = False
    segment: str | None = None
    segment_size: str | None = None
    trail_s: Annotated[float, Meta(gt=0, le=60)] | None = None

    def __post_init__(self) -> None:
        if self.save is not None and Path(self.save).suffix.lower() not in VIDEO_SUFFIXES:
            known = " or ".join(VIDEO_SUFFIXES)
            raise ValueError(f"save: {self.save!r}: use a name that ends in {known}")
        if self.append and self.jsonl is None:
            raise ValueError("append: there is no jsonl file to append to; set jsonl")
        if self.append and (self.segment or self.segment_size):
            raise ValueError("append: not possible with segment or segment_size; remove one")
        if (self.segment or self.segment_size) and self.save is None and self.jsonl is None:
            raise ValueError("segment: there is no file to split; set save or jsonl")
        _ = self.segment_s, self.segment_bytes  # raises ValueError if one is invalid

    @property
    def segment_s(self) -> float | None:
        """Seconds after which new files begin; None for never."""
        return parse_seconds("segment", self.segment)

    @property
    def segment_bytes(self) -> float | None:
        """Bytes at which new files begin; None for never."""
        return parse_bytes("segment_size", self.segment_size)


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An HTTP server for ``/metrics`` and ``/healthz``.

    Attributes:
        address: host and port to bind; ``*:9100`` binds every interface.
    """

    address: Annotated[str, Meta(min_length=1)] = "127.0.0.1:9100"


class TracingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenTelemetry spans of frames, sent by OTLP over HTTP (docs/operations.md).

    Attributes:
        endpoint: the collector; spans are sent to ``/v1/traces`` there.
        ratio: share of the frames that are traced, above 0 to 1.
    """

    endpoint: Annotated[str, Meta(pattern="^https?://")] = "http://127.0.0.1:4318"
    ratio: Annotated[float, Meta(gt=0, le=1)] = 0.01


class ControlConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A ZeroMQ endpoint for adding and removing sources while the pipeline runs (docs/wire.md).

    Attributes:
        endpoint: the endpoint to bind: ``ipc:///path/to/socket``, which only its owner can use, or
            ``tcp://HOST:PORT``.
        allowed_clients: a folder or list of ``.key`` files. Those with ``control: true`` in their
            rights file may control the sources named there. The server's own key is that of
            ``publish.curve``. Without ``allowed_clients``, the endpoint must be ``ipc://`` or on
            loopback.
        allow: the sources that may be added: ``rtsp:``, ``rtsp://192.168.0.0/16``,
            ``http://cam.local``, ``file:/srv/clips``, ``device:/dev/video0``, ``test:``. The
            default is everything with ``ipc://``, and ``rtsp:``, ``rtsps:`` and ``test:`` with
            ``tcp://``.
    """

    endpoint: Annotated[str, Meta(min_length=1)]
    allowed_clients: Annotated[str, Meta(min_length=1)] | tuple[str, ...] | None = None
    allow: tuple[str, ...] | None = None


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sources on the nodes of a Ray cluster: ``maskcast cluster run`` (docs/cluster.md).

    Attributes:
        gateway: the endpoint to bind for subscribers.
        gateway_sources: the endpoint to bind for the workers, ``tcp://HOST:PORT``; by default a
            free port of the address at which the nodes reach this machine.
        cpus_per_source: cores that Ray reserves for each source.
        gpus_per_source: GPUs that Ray reserves for each source; several can share one.
    """

    gateway: Annotated[str, Meta(min_length=1)] = "tcp://127.0.0.1:5555"
    gateway_sources: Annotated[str, Meta(min_length=1)] | None = None
    cpus_per_source: Annotated[float, Meta(ge=0, le=1024)] = 0.5
    gpus_per_source: Annotated[float, Meta(ge=0, le=16)] = 0.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration of a pipeline.

    ``publish=None`` runs without a socket: for recorders and callbacks alone. Without ``metrics``,
    nothing is served over HTTP. Without ``tracing``, no spans are created. ``control`` is the
    endpoint for adding and removing sources while the pipeline runs, or a section that limits who
    may do that; with it, ``sources`` may be empty, and a run ends only when it is stopped.
    ``cluster`` is for ``maskcast cluster run`` only.
    """

    sources: tuple[SourceConfig, ...] = ()
    model: ModelConfig = ModelConfig()
    publish: PublishConfig | None = PublishConfig()
    outputs: OutputConfig = OutputConfig()
    metrics: MetricsConfig | None = None
    tracing: TracingConfig | None = None
    control: ControlConfig | Annotated[str, Meta(min_length=1)] | None = None
    cluster: ClusterConfig | None = None

    if TYPE_CHECKING:  # the constructor accepts more types than the attributes have

        def __init__(
            self,
            *,
            sources: Sequence[SourceConfig | str | Path | Mapping[str, Any]] = (),
            model: ModelConfig = ...,
            publish: PublishConfig | None = ...,
            outputs: OutputConfig = ...,
            metrics: MetricsConfig | None = None,
            tracing: TracingConfig | None = None,
            control: ControlConfig | str | None = None,
            cluster: ClusterConfig | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        force_setattr(self, "sources", _as_sources(self.sources))
        _check_kind("model", self.model, ModelConfig)
        _check_kind("publish", self.publish, PublishConfig, optional=True)
        _check_kind("outputs", self.outputs, OutputConfig)
        _check_kind("metrics", self.metrics, MetricsConfig, optional=True)
        _check_kind("tracing", self.tracing, TracingConfig, optional=True)
        if not self.sources and self.control is None:
            raise ValueError("no sources: give at least one, or a control endpoint to add some")
        names = [source.name for source in self.sources if source.name is not None]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}; give each its own name")


def _as_sources(sources: object) -> tuple[SourceConfig, ...]:
    """Make sources from what a Python caller may give: addresses, mappings, ``SourceConfig``."""
    if isinstance(sources, str | Mapping | SourceConfig):
        sources = (sources,)
    if not isinstance(sources, Sequence):
        raise TypeError(f"sources: expected a list of sources, not {type(sources).__name__}")
    made = []
    for index, source in enumerate(sources):
        if isinstance(source, str):
            source = {"url": source}
        elif isinstance(source, Path):
            source = {"url": str(source)}
        if isinstance(source, Mapping):
            # Imported here, because config_file imports this module.
            from maskcast.pipeline.configuration.config_file import make_source

            source = make_source(source)
        if not isinstance(source, SourceConfig):
            raise TypeError(
                f"sources[{index}]: expected a URL, a mapping or SourceConfig, "
                f"not {type(source).__name__}"
            )
        made.append(source)
    return tuple(made)


def _check_kind(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        raise TypeError(f"{name}: expected {kind.__name__}, not {type(value).__name__}")


def name_sources(sources: Sequence[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Give every source without a name one made from its URL, so that all names are unique.

    The second ``cam`` becomes ``cam-2``, and so on.
    """
    taken = {source.name for source in sources if source.name is not None}
    named = []
    for source in sources:
        name = source.name
        if name is None:
            stem = source_name(source.url)[:56]
            name, number = stem, 1
            while name in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name)
        named.append(msgspec.structs.replace(source, name=name))
    return tuple(named)
