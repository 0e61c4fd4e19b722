"""Mask R-CNN on live video, out over ZeroMQ.

Every public name of the project is here, and nothing else is public::

    import maskcast

    for frame in maskcast.subscribe("tcp://127.0.0.1:5555"):
        print(frame.source, frame.seq, len(frame.instances), f"{frame.age_ms:.0f} ms old")

A name's module is imported when the name is first used, so ``import maskcast`` is fast and needs
no part of the project that is not used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.bundle import Bundle as Bundle
    from engines.bundle import Manifest as Manifest
    from engines.bundle import default_bundle as default_bundle
    from engines.bundle import open_bundle as open_bundle
    from engines.engine import Detections as Detections
    from engines.engine import Engine as Engine
    from engines.errors import InputError as InputError
    from engines.instances import Instances as Instances
    from engines.load import load_engine as load_engine
    from engines.load import predict as predict
    from pipeline.config import Config as Config
    from pipeline.config import load_config as load_config
    from pipeline.draw import Painter as Painter
    from pipeline.frame import Frame as Frame
    from pipeline.pipeline import Pipeline as Pipeline
    from pipeline.recorder import JsonlRecorder as JsonlRecorder
    from pipeline.recorder import VideoRecorder as VideoRecorder
    from pipeline.subscriber import PublishedFrame as PublishedFrame
    from pipeline.subscriber import StreamEvent as StreamEvent
    from pipeline.subscriber import Subscription as Subscription
    from pipeline.subscriber import subscribe as subscribe

__version__ = "0.1.0"

_HOMES = {
    "engines.bundle": ("Bundle", "Manifest", "default_bundle", "open_bundle"),
    "engines.engine": ("Detections", "Engine"),
    "engines.errors": ("InputError",),
    "engines.instances": ("Instances",),
    "engines.load": ("load_engine", "predict"),
    "pipeline.config": ("Config", "load_config"),
    "pipeline.draw": ("Painter",),
    "pipeline.frame": ("Frame",),
    "pipeline.pipeline": ("Pipeline",),
    "pipeline.recorder": ("JsonlRecorder", "VideoRecorder"),
    "pipeline.subscriber": ("PublishedFrame", "StreamEvent", "Subscription", "subscribe"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", "main", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'maskcast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """Run the ``maskcast`` command.

    What the user got wrong ends as one line on stderr and exit code 2. Ctrl-C and SIGTERM end
    every command the same way: each command says in its help what it still does then.
    """
    import signal
    import sys

    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)

        import typer

        from engines.errors import InputError

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

        import builder.commands
        import pipeline.commands

        pipeline.commands.mount(app)
        builder.commands.mount(app)
    except KeyboardInterrupt:  # nothing has begun
        sys.exit(0)
    try:
        app(prog_name="maskcast")
    except InputError as error:
        sys.stderr.write(f"maskcast: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
