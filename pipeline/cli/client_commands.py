"""The commands of clients: record, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli import options

if TYPE_CHECKING:
    from maskcast.pipeline.wire.losses import Tally


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("record")(record)
    app.command("replay")(replay)


def record(
    endpoint: options.Endpoint,
    file: options.Recording,
    source: options.OnlySources = None,
    follow: options.Follow = False,
    segment: options.Segment = None,
    segment_size: options.SegmentSize = None,
    disk_limit: options.DiskLimit = None,
    on: options.OnEvents = None,
    before: options.Before = 5.0,
    after: options.After = 10.0,
    video: options.ClipVideo = False,
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
) -> None:
    r"""Record what a publisher sends, until its sources have ended.

    Messages are written as they were sent, to an MCAP file.

    \b
    Examples:
      maskcast record tcp://127.0.0.1:5555 day.mcap
      maskcast record tcp://cam:5555 cam.mcap --follow --segment 1h --disk-limit 20GB
      maskcast record tcp://cam:5555 door.mcap --on zone_entered --before 5 --after 10 --video
    """
    from maskcast.pipeline.clients.recording import record as run
    from maskcast.pipeline.log import configure
    from maskcast.pipeline.quantities import parse_bytes, parse_seconds

    configure()
    tally = run(
        endpoint,
        file,
        sources=source,
        until_ended=not follow,
        segment_s=_parsed(parse_seconds, "--segment", segment),
        segment_bytes=_parsed(parse_bytes, "--segment-size", segment_size),
        disk_bytes=_parsed(parse_bytes, "--disk-limit", disk_limit),
        on=[] if on is None else [name.strip() for name in on.split(",") if name.strip()],
        before_s=before,
        after_s=after,
        video=video,
        server_key=server_key,
        client_key=client_key,
    )
    typer.echo(_summary(tally), err=True)


def replay(
    files: options.Recordings,
    publish: options.ReplayTo,
    speed: options.Speed = "1",
    loop: options.Loop = False,
    wait_subscribers: options.ReplayWait = 1,
    secret_key: options.SecretKey = None,
    allowed_clients: options.AllowedClients = None,
) -> None:
    r"""Publish recordings again, as they were sent.

    \b
    Example:
      maskcast replay day.mcap --publish tcp://127.0.0.1:5555 --speed 2 --loop
    """
    from maskcast.pipeline.clients.replay import replay as run
    from maskcast.pipeline.log import configure

    configure()
    factor: float | Literal["max"] = "max"
    if speed != "max":
        try:
            factor = float(speed)
        except ValueError:
            raise InputError(f"--speed {speed}: use a number above 0, or max") from None
    sent = run(
        list(files),
        publish,
        speed=factor,
        loop=loop,
        wait_subscribers=wait_subscribers,
        secret_key=secret_key,
        allowed_clients=allowed_clients,
    )
    typer.echo(f"{sent} messages sent", err=True)


def _parsed(
    parse: Callable[[str, str | None], float | None], option: str, text: str | None
) -> float | None:
    try:
        return parse(option, text)
    except ValueError as error:
        raise InputError(str(error)) from None


def _summary(tally: Tally) -> str:
    counts = {"lost": tally.lost, "malformed": tally.malformed}
    problems = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{tally.received} frames recorded{problems}"
