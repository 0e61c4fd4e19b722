"""Arguments and options of the run-time commands, grouped as the help shows them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

INPUT, MODEL, OUTPUT = "Input", "Model", "Output"
PUBLISHING, OPERATION = "Publishing", "Operation"

VIEW_HTTP = "127.0.0.1:8080"
"""Default address of the browser view."""


def _option(*names: str, panel: str, metavar: str | None, text: str, **limits: Any) -> Any:
    return typer.Option(
        *names, rich_help_panel=panel, metavar=metavar, help=text, show_default=False, **limits
    )


_input, _model, _output, _publishing, _operation = (
    partial(_option, panel=panel) for panel in (INPUT, MODEL, OUTPUT, PUBLISHING, OPERATION)
)

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE...",
        help="Videos, images, folders, - (standard input), rtsp://, http://, rtmp://, udp://, "
        "/dev/video0, screen://, test://1280x720@30.",
        show_default=False,
    ),
]
Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Image files, folders or quoted patterns."),
]
Endpoint = Annotated[
    str, typer.Argument(metavar="ENDPOINT", help="The publisher's endpoint, tcp://HOST:PORT.")
]

ConfigFile = Annotated[
    Path | None, _input(metavar="FILE", text="Configuration, YAML; options override it.")
]
Names = Annotated[
    list[str] | None,
    _input("--name", metavar="NAME", text="Name of a source; repeat in the order of sources."),
]
MaxFps = Annotated[
    float | None,
    _input(metavar="FPS", text="Maximum frame rate of each source.", min=0.001, max=1000),
]
Limit = Annotated[
    int | None, _input(metavar="N", text="Stop after N frames of each source.", min=1)
]
OnlySources = Annotated[
    list[str] | None,
    _input("--source", metavar="NAME", text="Only this source; may be repeated."),
]
TimeoutS = Annotated[
    float, _input(metavar="S", text="Stop after S seconds without data (30).", min=0)
]

Model = Annotated[str | None, _model(metavar="BUNDLE", text="Bundle folder, or default.")]
Engine = Annotated[
    str | None,
    _model(metavar="BACKEND", text="auto, openvino, onnxruntime or tensorrt (auto)."),
]
Mode = Annotated[
    str | None, _model(metavar="MODE", text="latency, throughput or auto: by source (auto).")
]
ScoreThreshold = Annotated[
    float | None, _model(metavar="SCORE", text="Minimum score (the bundle's own).", min=0, max=1)
]
Pose = Annotated[
    bool | None, _model("--pose", metavar=None, text="Estimate keypoints and draw skeletons.")
]
Classes = Annotated[str | None, _model(metavar="NAME,...", text="Report only these classes (all).")]

Save = Annotated[
    Path | None, _output(metavar="OUT.MP4", text="Write annotated video, .mp4 or .mkv.")
]
Jsonl = Annotated[
    str | None, _output(metavar="OUT.JSONL", text="Write JSON lines; - is standard output.")
]
Append = Annotated[
    bool | None, _output("--append", metavar=None, text="Add to an existing JSONL file.")
]
Segment = Annotated[
    str | None, _output(metavar="TIME", text="Start new files after 30s, 10m, 1h, ...")
]
SegmentSize = Annotated[
    str | None, _output(metavar="SIZE", text="Start new files at 500MB, 2GB, ...")
]
Recording = Annotated[
    Path, typer.Argument(metavar="FILE.MCAP", help="Recording to write; must not exist.")
]
Recordings = Annotated[
    list[Path], typer.Argument(metavar="FILE.MCAP...", help="Recordings, sent in this order.")
]
DiskLimit = Annotated[
    str | None, _output(metavar="SIZE", text="Delete the oldest files above this total.")
]
Follow = Annotated[
    bool, _output("--follow", metavar=None, text="Continue after all sources have ended.")
]
OnEvents = Annotated[
    str | None, _output("--on", metavar="EVENT,...", text="Record only clips around these events.")
]
Before = Annotated[
    float, _output("--before", metavar="S", text="Seconds before the event (5).", min=0, max=600)
]
After = Annotated[
    float, _output("--after", metavar="S", text="Seconds after the last event (10).", min=0)
]
ClipVideo = Annotated[
    bool, _output("--video", metavar=None, text="Write an annotated .mp4 of each clip.")
]
TrailS = Annotated[
    float | None,
    _output(
        "--trail", metavar="S", text="Draw the last S seconds of tracks' paths (none).", min=0.1
    ),
]
OutFolder = Annotated[
    Path | None, _output("--out", metavar="DIR", text="Write annotated images to this folder.")
]
JsonFile = Annotated[
    str | None, _output("--json", metavar="FILE", text="Write JSON lines; - is standard output.")
]
Events = Annotated[bool, _output("--events", metavar=None, text="With --json, print events too.")]
ZonesSource = Annotated[
    str | None,
    typer.Argument(metavar="[CLIP|SOURCE]", help="A clip, a camera, or a configured source."),
]
ZonesFile = Annotated[Path, _output("--out", metavar="FILE", text="Image to write (zones.png).")]
AsJson = Annotated[bool, _output("--json", metavar=None, text="Print one JSON object per frame.")]

Publish = Annotated[
    str | None,
    _publishing(metavar="ENDPOINT", text="Endpoint to bind (tcp://127.0.0.1:5555)."),
]
Gateways = Annotated[
    list[str] | None,
    _publishing(
        "--gateway", metavar="ENDPOINT", text="Connect to this gateway instead; may be repeated."
    ),
]
GatewayKey = Annotated[
    Path | None, _publishing(metavar="FILE", text="The gateways' .key file, if encrypted.")
]
Masks = Annotated[
    str | None,
    _publishing(metavar="FORMAT", text="crop_u8, crop_bits, coco_rle, polygon or none (crop_u8)."),
]
JpegQuality = Annotated[
    int | None,
    _publishing(metavar="Q", text="Add JPEG images of this quality (none).", min=1, max=100),
]
WaitSubscribers = Annotated[
    int | None,
    _publishing(metavar="N", text="Wait for N subscribers per source before starting.", min=0),
]
MqttBroker = Annotated[
    str, typer.Argument(metavar="BROKER", help="mqtt://[USER@]HOST[:PORT]/PREFIX; mqtts:// is TLS.")
]
PasswordFile = Annotated[
    Path | None, _publishing("--password-file", metavar="FILE", text="File with the password.")
]
CaFile = Annotated[
    Path | None, _publishing("--ca", metavar="FILE", text="CA certificates, PEM (the system's).")
]
Discovery = Annotated[
    str, _publishing(metavar="PREFIX", text="Home Assistant discovery, or none (homeassistant).")
]
WebhookUrl = Annotated[
    str, typer.Argument(metavar="URL", help="URL to post to, https://HOST/PATH.")
]
WebhookEvents = Annotated[
    str | None, _publishing("--on", metavar="EVENT,...", text="Post only these events.")
]
SecretFile = Annotated[
    Path | None, _publishing("--secret-file", metavar="FILE", text="Sign with this file's content.")
]
ReplayTo = Annotated[str, _publishing("--publish", metavar="ENDPOINT", text="Endpoint to bind.")]
Speed = Annotated[
    str, _publishing(metavar="FACTOR", text="Speed factor; max sends without delays (1).")
]
Loop = Annotated[bool, _publishing("--loop", metavar=None, text="Repeat after the last message.")]
ReplayWait = Annotated[
    int,
    _publishing("--wait-subscribers", metavar="N", text="Subscribers to wait for (1).", min=0),
]
SecretKey = Annotated[
    Path | None, _publishing(metavar="FILE", text="Encrypt with this .key_secret file.")
]
AllowedClients = Annotated[
    Path | None, _publishing(metavar="DIR", text="Folder of .key files that may subscribe.")
]
GatewayPublish = Annotated[
    str,
    _publishing("--publish", metavar="ENDPOINT", text="Endpoint to bind for subscribers."),
]
GatewaySources = Annotated[
    str | None,
    _input("--sources", metavar="ENDPOINT", text="Endpoint to bind for publishers."),
]
Upstream = Annotated[
    list[str] | None,
    _input(metavar="ENDPOINT", text="Publisher or gateway to connect to; may be repeated."),
]
AllowedPublishers = Annotated[
    Path | None, _input(metavar="DIR", text="Folder of .key files that may publish.")
]
ServerKey = Annotated[
    Path | None, _publishing(metavar="FILE", text="The publisher's .key file, if encrypted.")
]
ClientKey = Annotated[
    Path | None, _publishing(metavar="FILE", text="Your own .key_secret file, if encrypted.")
]

Metrics = Annotated[
    str | None, _operation(metavar="HOST:PORT", text="Serve /metrics and /healthz over HTTP.")
]
Control = Annotated[
    str | None,
    _operation(
        metavar="ENDPOINT", text="Accept maskcast ctl; run until stopped (ipc://... or tcp://...)."
    ),
]
View = Annotated[
    bool, _operation("--view", metavar=None, text="Serve a live web page; adds JPEG images.")
]
ViewHttp = Annotated[
    str | None,
    _operation(metavar="HOST:PORT", text="Address of the page; implies --view (127.0.0.1:8080)."),
]
LogLevel = Annotated[
    str,
    _operation(metavar="LEVEL", text="debug, info, warning or error (warning)."),
]
Http = Annotated[str, _operation(metavar="HOST:PORT", text="Address of the page (127.0.0.1:8080).")]
Token = Annotated[
    str | None,
    _operation(
        metavar="TOKEN",
        text="Token that browsers must send; required off loopback.",
        envvar="MASKCAST_VIEW_TOKEN",
        show_envvar=True,
    ),
]
LogFormat = Annotated[str, _operation(metavar="FORMAT", text="text (key=value) or json (text).")]
