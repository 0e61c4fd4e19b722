"""Run Mask R-CNN on live video and stream the instance masks over ZeroMQ.

Every public name of the project is here, and nothing else is public::

    import maskcast

    for frame in maskcast.subscribe("tcp://127.0.0.1:5555"):
        print(frame.source, frame.seq, len(frame.instances), f"{frame.age_ms:.0f} ms old")

A name's module is imported when the name is first used, so ``import maskcast`` is fast and needs
no part of the project that is not used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as a type checker reads it; typing itself would be slow to import
if TYPE_CHECKING:
    from maskcast.engines.bundle import Bundle as Bundle
    from maskcast.engines.bundle import FixedInput as FixedInput
    from maskcast.engines.bundle import GraphFile as GraphFile
    from maskcast.engines.bundle import Graphs as Graphs
    from maskcast.engines.bundle import LongestSideInput as LongestSideInput
    from maskcast.engines.bundle import Manifest as Manifest
    from maskcast.engines.bundle import default_bundle as default_bundle
    from maskcast.engines.bundle import open_bundle as open_bundle
    from maskcast.engines.engine import Detections as Detections
    from maskcast.engines.engine import Engine as Engine
    from maskcast.engines.errors import InputError as InputError
    from maskcast.engines.image import NetworkImage as NetworkImage
    from maskcast.engines.instances.instances import Instances as Instances
    from maskcast.engines.instances.instances import PolygonMasks as PolygonMasks
    from maskcast.engines.instances.instances import RleMasks as RleMasks
    from maskcast.engines.instances.keypoints import Keypoints as Keypoints
    from maskcast.engines.instances.masks import Patch as Patch
    from maskcast.engines.load import load_engine as load_engine
    from maskcast.engines.load import predict as predict
    from maskcast.engines.plan import Plan as Plan
    from maskcast.pipeline.clients.recording import record as record
    from maskcast.pipeline.clients.replay import replay as replay
    from maskcast.pipeline.cluster.gateway import Gateway as Gateway
    from maskcast.pipeline.cluster.gateway import GatewayStats as GatewayStats
    from maskcast.pipeline.configuration.config import ClusterConfig as ClusterConfig
    from maskcast.pipeline.configuration.config import Config as Config
    from maskcast.pipeline.configuration.config import ControlConfig as ControlConfig
    from maskcast.pipeline.configuration.config import CurveConfig as CurveConfig
    from maskcast.pipeline.configuration.config import MetricsConfig as MetricsConfig
    from maskcast.pipeline.configuration.config import ModelConfig as ModelConfig
    from maskcast.pipeline.configuration.config import OutputConfig as OutputConfig
    from maskcast.pipeline.configuration.config import PublishConfig as PublishConfig
    from maskcast.pipeline.configuration.config import SourceConfig as SourceConfig
    from maskcast.pipeline.configuration.config import TracingConfig as TracingConfig
    from maskcast.pipeline.configuration.config_file import load_config as load_config
    from maskcast.pipeline.configuration.zones import LineConfig as LineConfig
    from maskcast.pipeline.configuration.zones import ZoneConfig as ZoneConfig
    from maskcast.pipeline.durations import Distribution as Distribution
    from maskcast.pipeline.durations import Percentiles as Percentiles
    from maskcast.pipeline.frame import Frame as Frame
    from maskcast.pipeline.frame import Timeline as Timeline
    from maskcast.pipeline.monitor.health import Health as Health
    from maskcast.pipeline.outputs.draw import Annotator as Annotator
    from maskcast.pipeline.outputs.jsonl import JsonlRecorder as JsonlRecorder
    from maskcast.pipeline.outputs.recorder import Published as Published
    from maskcast.pipeline.outputs.recorder import Recorder as Recorder
    from maskcast.pipeline.outputs.video import VideoRecorder as VideoRecorder
    from maskcast.pipeline.pipeline import Pipeline as Pipeline
    from maskcast.pipeline.run import run as run
    from maskcast.pipeline.sources.state import SourceState as SourceState
    from maskcast.pipeline.stats import SourceStats as SourceStats
    from maskcast.pipeline.stats import StageStats as StageStats
    from maskcast.pipeline.stats import Stats as Stats
    from maskcast.pipeline.stats import Witness as Witness
    from maskcast.pipeline.subscriber.losses import Tally as Tally
    from maskcast.pipeline.subscriber.received import PublishedFrame as PublishedFrame
    from maskcast.pipeline.subscriber.received import StreamEvent as StreamEvent
    from maskcast.pipeline.subscriber.subscribe import subscribe as subscribe
    from maskcast.pipeline.subscriber.subscription import EndOfStreams as EndOfStreams
    from maskcast.pipeline.subscriber.subscription import Subscription as Subscription
    from maskcast.pipeline.tracking.analysis import Analysis as Analysis
    from maskcast.pipeline.tracking.analysis import TrackEvent as TrackEvent
    from maskcast.pipeline.wire.curve import ClientKeys as ClientKeys
    from maskcast.pipeline.wire.curve import KeyPair as KeyPair
    from maskcast.pipeline.wire.message import WireError as WireError
    from maskcast.pipeline.wire.rights import ClientRights as ClientRights
    from maskcast.pipeline.wire.server_keys import ServerKeys as ServerKeys

__version__ = "0.1.0"

_MODULES = {
    "maskcast.engines.bundle": (
        "Bundle",
        "FixedInput",
        "GraphFile",
        "Graphs",
        "LongestSideInput",
        "Manifest",
        "default_bundle",
        "open_bundle",
    ),
    "maskcast.engines.engine": (
        "Detections",
        "Engine",
    ),
    "maskcast.engines.errors": ("InputError",),
    "maskcast.engines.image": ("NetworkImage",),
    "maskcast.engines.instances.instances": (
        "Instances",
        "PolygonMasks",
        "RleMasks",
    ),
    "maskcast.engines.instances.keypoints": ("Keypoints",),
    "maskcast.engines.load": (
        "load_engine",
        "predict",
    ),
    "maskcast.engines.instances.masks": ("Patch",),
    "maskcast.engines.plan": ("Plan",),
    "maskcast.pipeline.clients.recording": ("record",),
    "maskcast.pipeline.clients.replay": ("replay",),
    "maskcast.pipeline.cluster.gateway": (
        "Gateway",
        "GatewayStats",
    ),
    "maskcast.pipeline.configuration.config": (
        "ClusterConfig",
        "Config",
        "ControlConfig",
        "CurveConfig",
        "MetricsConfig",
        "ModelConfig",
        "OutputConfig",
        "PublishConfig",
        "SourceConfig",
        "TracingConfig",
    ),
    "maskcast.pipeline.configuration.config_file": ("load_config",),
    "maskcast.pipeline.durations": (
        "Distribution",
        "Percentiles",
    ),
    "maskcast.pipeline.frame": (
        "Frame",
        "Timeline",
    ),
    "maskcast.pipeline.monitor.health": ("Health",),
    "maskcast.pipeline.outputs.draw": ("Annotator",),
    "maskcast.pipeline.outputs.jsonl": ("JsonlRecorder",),
    "maskcast.pipeline.outputs.recorder": (
        "Published",
        "Recorder",
    ),
    "maskcast.pipeline.outputs.video": ("VideoRecorder",),
    "maskcast.pipeline.pipeline": ("Pipeline",),
    "maskcast.pipeline.run": ("run",),
    "maskcast.pipeline.sources.state": ("SourceState",),
    "maskcast.pipeline.stats": (
        "SourceStats",
        "StageStats",
        "Stats",
        "Witness",
    ),
    "maskcast.pipeline.subscriber.losses": ("Tally",),
    "maskcast.pipeline.subscriber.received": (
        "PublishedFrame",
        "StreamEvent",
    ),
    "maskcast.pipeline.subscriber.subscribe": ("subscribe",),
    "maskcast.pipeline.subscriber.subscription": (
        "EndOfStreams",
        "Subscription",
    ),
    "maskcast.pipeline.tracking.analysis": (
        "Analysis",
        "TrackEvent",
    ),
    "maskcast.pipeline.configuration.zones": (
        "ZoneConfig",
        "LineConfig",
    ),
    "maskcast.pipeline.wire.curve": (
        "ClientKeys",
        "KeyPair",
    ),
    "maskcast.pipeline.wire.message": ("WireError",),
    "maskcast.pipeline.wire.rights": ("ClientRights",),
    "maskcast.pipeline.wire.server_keys": ("ServerKeys",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", "main", *_MODULE_OF]


def __getattr__(name: str) -> object:
    import importlib

    if name not in _MODULE_OF:
        raise AttributeError(f"module 'maskcast' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """Run the ``maskcast`` command.

    A mistake of the user is reported as one line on stderr, with exit code 2. Ctrl-C and SIGTERM
    end a command at any point, without a traceback: with exit code 130 for "build", "train" and
    "eval", whose work is then incomplete, and with 0 for all others.
    """
    import errno
    import signal
    import sys

    from maskcast.engines.errors import InputError

    interrupted = False
    exit_code = 130 if sys.argv[1:2] in (["build"], ["train"], ["eval"]) else 0

    def end(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        sys.exit(exit_code)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)

    import typer

    from maskcast.builder import commands as builder_commands
    from maskcast.pipeline.cli import commands as pipeline_commands

    app = typer.Typer(
        help="Run Mask R-CNN on live video and stream the instance masks over ZeroMQ.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version."),
    ) -> None:
        if version:
            typer.echo(f"maskcast {__version__}")
            raise typer.Exit

    pipeline_commands.mount(app)
    builder_commands.mount(app)
    try:
        app(prog_name="maskcast")
    except InputError as error:
        sys.stderr.write(f"maskcast: {error}\n")
        exit_code = 2
    except SystemExit as end_of_command:
        exit_code = end_of_command.code if isinstance(end_of_command.code, int) else 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            sys.stderr.write(f"maskcast: {error.filename}: {error.strerror}; use a shorter path\n")
            exit_code = 2
        elif not interrupted:  # otherwise a library has replaced the SystemExit by its own error
            raise
    finally:  # from here on an interrupt must not cause a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _leave(exit_code)


def _leave(exit_code: int) -> None:
    """End the program, at once if a thread hangs in FFmpeg or in an engine."""
    import os
    import sys

    from maskcast.engines.threads import is_any_running

    if is_any_running():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
