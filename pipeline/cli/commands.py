"""The run-time commands: run, watch, profile, demo, predict, and those of other modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli import client_commands, control_commands, key_commands, options
from maskcast.pipeline.cli.cluster import commands as cluster_commands

if TYPE_CHECKING:
    from maskcast.pipeline.configuration.config import SourceConfig
    from maskcast.pipeline.subscriber.subscription import PublishedFrame, Subscription


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(run)
    app.command()(watch)
    app.command()(view)
    app.command()(profile)
    app.command()(demo)
    client_commands.mount(app)
    app.command()(zones)
    app.command()(predict)
    app.command()(doctor)
    config = typer.Typer(help="Show and check configuration files.")
    config.command("example")(config_example)
    config.command("check")(config_check)
    app.add_typer(config, name="config", no_args_is_help=True)
    key_commands.mount(app)
    control_commands.mount(app)
    cluster_commands.mount(app)


def run(
    sources: options.Sources = None,
    config: options.ConfigFile = None,
    name: options.Names = None,
    max_fps: options.MaxFps = None,
    limit: options.Limit = None,
    model: options.Model = None,
    engine: options.Engine = None,
    mode: options.Mode = None,
    score_threshold: options.ScoreThreshold = None,
    classes: options.Classes = None,
    pose: options.Pose = None,
    save: options.Save = None,
    jsonl: options.Jsonl = None,
    append: options.Append = None,
    segment: options.Segment = None,
    segment_size: options.SegmentSize = None,
    trail: options.TrailS = None,
    publish: options.Publish = None,
    gateway: options.Gateways = None,
    masks: options.Masks = None,
    jpeg_quality: options.JpegQuality = None,
    wait_subscribers: options.WaitSubscribers = None,
    secret_key: options.SecretKey = None,
    allowed_clients: options.AllowedClients = None,
    gateway_key: options.GatewayKey = None,
    metrics: options.Metrics = None,
    control: options.Control = None,
    view: options.View = False,
    view_http: options.ViewHttp = None,
    log_level: options.LogLevel = "warning",
    log_format: options.LogFormat = "text",
) -> None:
    """Run a model on video and publish the instances.

    Ctrl-C and SIGTERM drain the pipeline and close output files.

    Examples:
      maskcast run clip.mp4 --save annotated.mp4
      maskcast run /dev/video0 rtsp://camera/stream --name desk --name door
      maskcast run --config cameras.yaml --metrics 127.0.0.1:9100
      maskcast run rtsp://camera/stream --view
    """
    from maskcast.pipeline.cli.run import run_to_end
    from maskcast.pipeline.configuration.config_file import load_config, make_config, override
    from maskcast.pipeline.log import configure

    configure(log_level, log_format)
    other_key = gateway_key if gateway else allowed_clients
    if (secret_key is None) != (other_key is None) and config is None:
        other = "--gateway-key" if gateway else "--allowed-clients"
        raise InputError(f"--secret-key and {other} go together; give both")
    changes: dict[str, Any] = {
        "model.bundle": model,
        "model.engine": engine,
        "model.mode": mode,
        "model.score_threshold": score_threshold,
        "model.classes": classes.split(",") if classes else None,
        "model.pose": pose,
        "publish.endpoint": publish,
        "publish.gateways": gateway,
        "publish.masks": masks,
        "publish.jpeg_quality": jpeg_quality,
        "publish.wait_subscribers": wait_subscribers,
        "publish.curve.secret_key": None if secret_key is None else str(secret_key),
        "publish.curve.allowed_clients": None if allowed_clients is None else str(allowed_clients),
        "publish.curve.gateway_key": None if gateway_key is None else str(gateway_key),
        "outputs.save": None if save is None else str(save),
        "outputs.jsonl": jsonl,
        "outputs.append": append,
        "outputs.segment": segment,
        "outputs.segment_size": segment_size,
        "outputs.trail_s": trail,
        "metrics.address": metrics,
    }
    if config is not None:
        given = {"sources": sources, "control": control}
        settings = load_config(config, given | changes)
    elif sources or control:
        settings = override(make_config({"sources": sources or [], "control": control}), changes)
    else:
        raise InputError(
            "no source: give a file, a URL, /dev/video0 or test://1280x720@30, or --config FILE, "
            "or --control ENDPOINT to add sources later"
        )
    if (changed := changed_sources(settings.sources, name, max_fps)) is not None:
        settings = override(settings, {"sources": changed})
    if view or view_http is not None:
        from maskcast.pipeline.cli.view import run_with_view

        run_with_view(settings, view_http or options.VIEW_HTTP, limit)
    else:
        run_to_end(settings, limit=limit)


def changed_sources(
    sources: Sequence[SourceConfig], names: list[str] | None, max_fps: float | None
) -> list[dict[str, Any]] | None:
    """Return the sources with the command line's names and frame rate; None if it gives neither.

    Raises:
        InputError: there are more names than sources.
    """
    import msgspec

    if names and len(names) > len(sources):
        raise InputError(f"--name: {len(names)} names for {len(sources)} sources; remove some")
    if not names and max_fps is None:
        return None
    changed = [msgspec.to_builtins(source) for source in sources]
    for source, name in zip(changed, names or [], strict=False):
        source["name"] = name
    for source in changed:
        source |= {} if max_fps is None else {"max_fps": max_fps}
    return changed


def watch(
    endpoint: options.Endpoint,
    source: options.OnlySources = None,
    limit: options.Limit = None,
    timeout_s: options.TimeoutS = 30.0,
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
    as_json: options.AsJson = False,
    events: options.Events = False,
) -> None:
    """Show what a publisher sends, until its sources have ended.

    Example:
      maskcast watch tcp://127.0.0.1:5555 --json
    """
    from maskcast.pipeline.cli.watch import print_json, show_table
    from maskcast.pipeline.log import configure
    from maskcast.pipeline.subscriber.subscribe import subscribe

    configure()
    if events and not as_json:
        raise InputError("--events: needs --json; give both")
    try:
        with subscribe(
            endpoint,
            source,
            policy="all",
            events=events,
            timeout_s=timeout_s,
            server_key=server_key,
            client_key=client_key,
        ) as subscription:
            if as_json:
                print_json(subscription, limit)
            else:
                show_table(cast("Subscription[PublishedFrame]", subscription), endpoint, limit)
    except TimeoutError as error:
        raise InputError(str(error)) from None
    except BrokenPipeError:
        # The reader has closed the pipe. Nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def view(
    endpoint: options.Endpoint,
    http: options.Http = options.VIEW_HTTP,
    token: options.Token = None,
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
) -> None:
    """Show what a publisher sends in a browser: live video with masks.

    The publisher must send images: maskcast run --jpeg-quality 80.

    Examples:
      maskcast view tcp://127.0.0.1:5555
      MASKCAST_VIEW_TOKEN=... maskcast view tcp://camera-host:5555 --http 0.0.0.0:8080
    """
    from maskcast.pipeline.cli.view import show_page
    from maskcast.pipeline.log import configure

    configure()
    show_page(endpoint, http, token, server_key, client_key)


def zones(
    source: options.ZonesSource = None,
    config: options.ConfigFile = None,
    out: options.ZonesFile = Path("zones.png"),
) -> None:
    """Draw a grid on a source's first frame, to place zones and lines.

    With a configuration, its zones and lines are checked and drawn.

    Examples:
      maskcast zones clip.mp4
      maskcast zones --config cameras.yaml --out zones.png
    """
    from maskcast.pipeline.cli.setup.zones import draw_zones

    shown = draw_zones(source, config, out)
    what = ", ".join(
        f"{len(regions)} {kind if len(regions) == 1 else kind + 's'}"
        for kind, regions in (("zone", shown.zones), ("line", shown.lines))
    )
    print(f"{out}: {what}" if config is not None else out)  # noqa: T201


def profile(
    source: Annotated[str, typer.Argument(help="A file is best: the same frames each time.")],
    model: options.Model = None,
    limit: options.Limit = None,
    mode: Annotated[
        str,
        typer.Option(metavar="MODE", help="latency, throughput or auto, as in maskcast run."),
    ] = "auto",
    pose: options.Pose = None,
    json: Annotated[
        Path | None, typer.Option(metavar="REPORT.JSON", help="Write the report as JSON.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE.JSON", help="Write every frame's timeline, for ui.perfetto.dev."
        ),
    ] = None,
) -> None:
    """Measure every stage, and compare the pipeline with the bare engine.

    A live source is measured for 300 frames, unless --limit is given. Ctrl-C prints the report of
    the frames so far.
    """
    from maskcast.pipeline.cli.profile.profile import show_profile
    from maskcast.pipeline.configuration.config_file import make_config
    from maskcast.pipeline.log import configure

    configure()
    chosen = make_config({"sources": [{"url": source}], "model": {"mode": mode}}).model.mode
    show_profile(source, model, limit, chosen, bool(pose), json, trace)


def demo(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="Any source; a street clip by default.")
    ] = None,
    limit: options.Limit = None,
) -> None:
    """Run the default model on a clip, with a subscriber in a second process.

    Writes demo.mp4 and demo.jsonl to the current folder.
    """
    from maskcast.pipeline.cli.demo import show
    from maskcast.pipeline.log import configure

    configure()
    show(source, limit)


def predict(
    images: options.Images,
    out: options.OutFolder = None,
    model: options.Model = None,
    score_threshold: options.ScoreThreshold = None,
    pose: options.Pose = None,
    as_json: options.JsonFile = None,
) -> None:
    """Find the instances in images.

    Example:
      maskcast predict photos/ --out annotated --json instances.jsonl
    """
    import msgspec
    from rich.console import Console

    from maskcast.engines.load import load_engine
    from maskcast.pipeline.cli.predict import find_images, predict_files
    from maskcast.pipeline.cli.watch import count_names

    paths = find_images(images)
    if as_json is not None and any(Path(as_json).resolve() == path.resolve() for path in paths):
        raise InputError(f"--json {as_json}: is an input; choose another file")
    engine = load_engine(model or "default", pose=bool(pose))
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
    from maskcast.pipeline.cli.setup.doctor import report

    typer.echo(report())


def config_example() -> None:
    """Print a configuration with every key, its default and what it does."""
    from maskcast.pipeline.cli.setup.configuration import example

    typer.echo(example(), nl=False)


def config_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration, YAML.")],
) -> None:
    """Check a configuration file, and the model and files that it names, as a run does.

    Cameras, other machines and the contents of videos are not checked.
    """
    from maskcast.pipeline.cli.setup.configuration import check

    typer.echo(check(file))
