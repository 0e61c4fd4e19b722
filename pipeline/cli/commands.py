"""The run-time commands: run, watch, profile, demo, keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli import control_commands
from maskcast.pipeline.cli.options import ClientKey, Limit, Model, ServerKey

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE...",
        help="A video file, a folder of images, http(s)://, rtsp(s)://, /dev/video0 or "
        "test://1280x720@30; several are run together.",
        show_default=False,
    ),
]


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(run)
    app.command()(watch)
    app.command()(profile)
    app.command()(demo)
    app.command()(predict)
    app.command()(doctor)
    config = typer.Typer(help="Show and check configuration files.")
    config.command("example")(config_example)
    config.command("check")(config_check)
    app.add_typer(config, name="config", no_args_is_help=True)
    keys = typer.Typer(help="Make keys for an encrypted publisher.")
    keys.callback()(lambda: None)  # so that there is a command `new`, though it is the only one
    keys.command("new")(new_keys)
    app.add_typer(keys, name="keys", no_args_is_help=True)
    control_commands.mount(app)


def run(
    sources: Sources = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML; what is given here overrides it.")
    ] = None,
    model: Model = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="auto (TensorRT where the bundle and the machine have it, else OpenVINO), "
            "openvino, onnxruntime or tensorrt.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="latency (an answer to each picture soon), throughput (many pictures a second), "
            "or auto: throughput where no source is live.",
        ),
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="ENDPOINT", help="Where subscribers connect  [default: tcp://127.0.0.1:5555]"
        ),
    ] = None,
    wait_subscribers: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Hold the sources until each has so many."),
    ] = None,
    secret_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Encrypt; the publisher's .key_secret, see keys new."),
    ] = None,
    allowed_clients: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Who may subscribe: a folder of .key files."),
    ] = None,
    limit: Limit = None,
    save: Annotated[
        Path | None, typer.Option(metavar="OUT.MP4", help="Write annotated video (.mp4, .mkv).")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(metavar="OUT.JSONL", help="Write one JSON object per frame.")
    ] = None,
    append: Annotated[
        bool | None, typer.Option("--append", help="Add to an existing JSONL file.")
    ] = None,
    segment: Annotated[
        str | None, typer.Option(metavar="TIME", help="Begin new files after 30s, 10m, 1h, ...")
    ] = None,
    segment_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Begin new files at 500MB, 2GB, ...")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve /metrics for Prometheus and /healthz, over HTTP."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="ENDPOINT",
            help="Let `maskcast ctl` add and remove sources: ipc:///path/to/socket or "
            "tcp://127.0.0.1:5556. The run then lasts until it is stopped.",
        ),
    ] = None,
    log_level: Annotated[
        str,
        typer.Option(metavar="LEVEL", help="Least that is logged: debug, info, warning, error."),
    ] = "warning",
    log_format: Annotated[
        str, typer.Option(metavar="FORM", help="One line an event: text (key=value) or json.")
    ] = "text",
) -> None:
    """Run a model on video and publish what it sees.

    Ctrl-C and SIGTERM end it cleanly: what is on its way is published, files are finished.
    """
    from maskcast.pipeline.cli.run import run_to_end
    from maskcast.pipeline.config import load_config, make_config, override
    from maskcast.pipeline.log import configure

    configure(log_level, log_format)
    changes: dict[str, Any] = {
        "sources": [{"url": url} for url in sources] if sources else None,
        "model.bundle": model,
        "model.engine": engine,
        "model.mode": mode,
        "publish.endpoint": publish,
        "publish.wait_subscribers": wait_subscribers,
        "publish.curve.secret_key": None if secret_key is None else str(secret_key),
        "publish.curve.allowed_clients": None if allowed_clients is None else str(allowed_clients),
        "outputs.save": None if save is None else str(save),
        "outputs.jsonl": None if jsonl is None else str(jsonl),
        "outputs.append": append,
        "outputs.segment": segment,
        "outputs.segment_size": segment_size,
        "metrics.address": metrics,
        "control": control,
    }
    if config is not None:
        first = {key: changes[key] for key in ("sources", "control")}
        settings = override(load_config(config, first), changes)
    elif sources or control:
        first = {key: changes.pop(key) for key in ("sources", "control") if changes[key]}
        settings = override(make_config(first), changes)
    else:
        raise InputError(
            "nothing to run on: give a source (a file, a URL, /dev/video0, test://1280x720@30) "
            "or --config FILE, or --control ENDPOINT to add some later"
        )
    run_to_end(settings, limit=limit)


def watch(
    endpoint: Annotated[str, typer.Argument(help="Where it is published, tcp://host:port.")],
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this source; may be given several times."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="End after so many frames.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Give up when nothing comes for so long.")
    ] = 30.0,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a frame, a line each.")
    ] = False,
) -> None:
    """Show what a publisher sends, until its sources have ended."""
    from maskcast.pipeline.cli.watch import print_json, show_table
    from maskcast.pipeline.wire.subscriber import subscribe

    try:
        with subscribe(
            endpoint,
            source,
            policy="all",
            timeout_s=timeout_s,
            server_key=server_key,
            client_key=client_key,
        ) as subscription:
            if as_json:
                print_json(subscription, limit)
            else:
                show_table(subscription, endpoint, limit)
    except TimeoutError as error:
        raise InputError(str(error)) from None
    except BrokenPipeError:
        # Whoever read has read enough. Nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def profile(
    source: Annotated[str, typer.Argument(help="A file is best: the same frames each time.")],
    model: Model = None,
    limit: Limit = None,
    mode: Annotated[
        str,
        typer.Option(metavar="MODE", help="latency, throughput or auto, as in maskcast run."),
    ] = "auto",
    json: Annotated[
        Path | None, typer.Option(metavar="REPORT.JSON", help="Write the figures to a file.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE.JSON", help="Write every frame's timeline, for ui.perfetto.dev."
        ),
    ] = None,
) -> None:
    """Measure every stage, and the pipeline against the bare engine in the same run.

    A live source is measured for 300 frames, unless --limit says otherwise. Ctrl-C prints the
    report of the frames so far.
    """
    from maskcast.pipeline.cli.profile import show_profile
    from maskcast.pipeline.config import make_config
    from maskcast.pipeline.log import configure

    configure()
    chosen = make_config({"sources": [{"url": source}], "model": {"mode": mode}}).model.mode
    show_profile(source, model, limit, chosen, json, trace)


def demo(
    source: Annotated[
        str | None, typer.Argument(help="Any source; without it, a clip of a street.")
    ] = None,
    limit: Limit = None,
) -> None:
    """Show everything at once: the default model on a clip, with a subscriber beside it.

    Writes demo.mp4 and demo.jsonl.
    """
    from maskcast.pipeline.cli.demo import show
    from maskcast.pipeline.log import configure

    configure()
    show(source, limit)


def new_keys(
    name: Annotated[
        Path, typer.Argument(help="Path without an ending: keys/server gives keys/server.key.")
    ],
) -> None:
    """Make a key pair: NAME.key for everyone, NAME.key_secret for its owner alone.

    The publisher and each subscriber need a pair of their own.
    """
    from maskcast.pipeline.wire.curve import new_keys as write_new_keys

    public, secret = write_new_keys(name)
    typer.echo(f"{public}  give it to the other side\n{secret}  keep it here, and secret")


def predict(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, folders of images, or patterns."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the annotated images.")
    ] = None,
    model: Model = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="SCORE", help="Minimum score.")
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="JSON lines; - is stdout.")
    ] = None,
) -> None:
    """Find the instances in images.

    Example: maskcast predict photos/ --out annotated --json instances.jsonl
    """
    import msgspec
    from rich.console import Console

    from maskcast.engines.load import load_engine
    from maskcast.pipeline.cli.predict import find_images, predict_files
    from maskcast.pipeline.cli.watch import count_names

    paths = find_images(images)
    if as_json is not None and any(Path(as_json).resolve() == path.resolve() for path in paths):
        raise InputError(f"--json {as_json}: is an input; choose another file")
    engine = load_engine(model or "default")
    console = Console(stderr=True, highlight=False)
    try:
        with open_text(as_json) as lines:
            for record in predict_files(engine, paths, out, score_threshold):
                lines.write(msgspec.json.encode(record).decode() + "\n")
                if as_json != "-":
                    labels = [str(found["category"]) for found in record.instances]
                    console.print(f"{record.file}: {count_names(labels) or 'nothing'}")
    finally:
        engine.close()


@contextmanager
def open_text(path: str | None) -> Iterator[TextIO]:
    """Open a text output: a file, standard output for "-", or nothing for None.

    Raises:
        InputError: the file cannot be written.
    """
    if path == "-":
        yield sys.stdout
        return
    try:
        file = Path(path or os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        yield file


def doctor() -> None:
    """Show what is installed, and which backends and codecs work."""
    from maskcast.pipeline.cli.doctor import report

    typer.echo(report())


def config_example() -> None:
    """Print a configuration with every key, its default and what it does."""
    from maskcast.pipeline.cli.configuration import example

    typer.echo(example(), nl=False)


def config_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration, YAML.")],
) -> None:
    """Check a configuration file."""
    from maskcast.pipeline.cli.configuration import check

    typer.echo(check(file))
