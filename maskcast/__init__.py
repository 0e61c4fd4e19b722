"""Mask R-CNN on live video, out over ZeroMQ.

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
    from maskcast.engines.bundle import Manifest as Manifest
    from maskcast.engines.bundle import default_bundle as default_bundle
    from maskcast.engines.bundle import open_bundle as open_bundle
    from maskcast.engines.engine import Detections as Detections
    from maskcast.engines.engine import Engine as Engine
    from maskcast.engines.errors import InputError as InputError
    from maskcast.engines.instances import Instances as Instances
    from maskcast.engines.load import load_engine as load_engine
    from maskcast.engines.load import predict as predict
    from maskcast.pipeline.config import Config as Config
    from maskcast.pipeline.config import load_config as load_config
    from maskcast.pipeline.frame import Frame as Frame
    from maskcast.pipeline.outputs.draw import Annotator as Annotator
    from maskcast.pipeline.outputs.jsonl import JsonlRecorder as JsonlRecorder
    from maskcast.pipeline.outputs.video import VideoRecorder as VideoRecorder
    from maskcast.pipeline.pipeline import Pipeline as Pipeline
    from maskcast.pipeline.wire.subscriber import PublishedFrame as PublishedFrame
    from maskcast.pipeline.wire.subscriber import StreamEvent as StreamEvent
    from maskcast.pipeline.wire.subscriber import Subscription as Subscription
    from maskcast.pipeline.wire.subscriber import subscribe as subscribe

__version__ = "0.1.0"

_HOMES = {
    "maskcast.engines.bundle": ("Bundle", "Manifest", "default_bundle", "open_bundle"),
    "maskcast.engines.engine": ("Detections", "Engine"),
    "maskcast.engines.errors": ("InputError",),
    "maskcast.engines.instances": ("Instances",),
    "maskcast.engines.load": ("load_engine", "predict"),
    "maskcast.pipeline.config": ("Config", "load_config"),
    "maskcast.pipeline.outputs.draw": ("Annotator",),
    "maskcast.pipeline.frame": ("Frame",),
    "maskcast.pipeline.pipeline": ("Pipeline",),
    "maskcast.pipeline.outputs.jsonl": ("JsonlRecorder",),
    "maskcast.pipeline.outputs.video": ("VideoRecorder",),
    "maskcast.pipeline.wire.subscriber": (
        "PublishedFrame",
        "StreamEvent",
        "Subscription",
        "subscribe",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", "main", *_HOME_OF]


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME_OF:
        raise AttributeError(f"module 'maskcast' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """Run the ``maskcast`` command.

    What the user got wrong ends as one line on stderr and exit code 2. Ctrl-C and SIGTERM end a
    command wherever it is, without a traceback: with exit code 0 where a stream was watched or run,
    with 130 where work is left undone.
    """
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
        help="Mask R-CNN on live video, out over ZeroMQ.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and stop."),
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
    except Exception:
        if not interrupted:
            raise
        # A library that calls back into Python made its own error of the interrupt.
    finally:  # what is left to do takes no time: no interrupt shall make a traceback of it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _leave(exit_code)


def _leave(exit_code: int) -> None:
    """End the program, at once if a thread hangs in FFmpeg or in an engine."""
    import os
    import sys

    from maskcast.engines.threads import is_any_left

    if is_any_left():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
