"""The commands that receive or send a publisher's messages: gateway, record, replay, bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli import options

if TYPE_CHECKING:
    from maskcast.pipeline.subscriber.losses import Tally


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("gateway")(gateway)
    app.command("record")(record)
    app.command("replay")(replay)
    bridge = typer.Typer(help="Forward counts, states and events to other systems.")
    bridge.command("mqtt")(bridge_mqtt)
    bridge.command("webhook")(bridge_webhook)
    app.add_typer(bridge, name="bridge", no_args_is_help=True)


def gateway(
    publish: options.GatewayPublish = "tcp://127.0.0.1:5555",
    sources: options.GatewaySources = None,
    upstream: options.Upstream = None,
    secret_key: options.SecretKey = None,
    allowed_clients: options.AllowedClients = None,
    allowed_publishers: options.AllowedPublishers = None,
    server_key: options.ServerKey = None,
    metrics: options.Metrics = None,
    log_level: options.LogLevel = "warning",
    log_format: options.LogFormat = "text",
) -> None:
    """Forward the messages of many publishers at one endpoint, until stopped.

    Publishers connect to it with maskcast run --gateway ENDPOINT.

    Examples:
      maskcast gateway --sources tcp://127.0.0.1:5556 --publish tcp://127.0.0.1:5555
      maskcast gateway --upstream tcp://cam1:5555 --upstream tcp://cam2:5555
    """
    from maskcast.pipeline.cli.cluster.gateway import run_gateway
    from maskcast.pipeline.log import configure

    configure(log_level, log_format)
    run_gateway(
        publish,
        sources,
        upstream or (),
        secret_key=secret_key,
        allowed_clients=allowed_clients,
        allowed_publishers=allowed_publishers,
        server_key=server_key,
        metrics=metrics,
    )


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
    """Record what a publisher sends, until its sources have ended.

    Messages are written as they were sent, to an MCAP file.

    Examples:
      maskcast record tcp://127.0.0.1:5555 day.mcap
      maskcast record tcp://cam:5555 cam.mcap --follow --segment 1h --disk-limit 20GB
      maskcast record tcp://cam:5555 door.mcap --on zone_entered --before 5 --after 10 --video
    """
    from maskcast.pipeline.clients.recording import record as run
    from maskcast.pipeline.configuration.quantities import parse_bytes, parse_seconds
    from maskcast.pipeline.log import configure

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
    """Publish recordings again, as they were sent.

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


def bridge_mqtt(
    endpoint: options.Endpoint,
    broker: options.MqttBroker,
    source: options.OnlySources = None,
    password_file: options.PasswordFile = None,
    ca: options.CaFile = None,
    discovery: options.Discovery = "homeassistant",
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
) -> None:
    """Publish changes of counts and states, and events, to an MQTT broker.

    The password is read from --password-file or $MASKCAST_MQTT_PASSWORD.

    Example:
      maskcast bridge mqtt tcp://127.0.0.1:5555 mqtts://user@broker/maskcast
    """
    from maskcast.pipeline.clients.mqtt import Broker, run_mqtt
    from maskcast.pipeline.clients.secret import read_secret
    from maskcast.pipeline.log import configure

    configure()
    password = read_secret(password_file, "MASKCAST_MQTT_PASSWORD")
    run_mqtt(
        endpoint,
        Broker.parse(broker, password, ca),
        sources=source,
        discovery=None if discovery == "none" else discovery,
        server_key=server_key,
        client_key=client_key,
    )


def bridge_webhook(
    endpoint: options.Endpoint,
    url: options.WebhookUrl,
    source: options.OnlySources = None,
    on: options.WebhookEvents = None,
    secret_file: options.SecretFile = None,
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
) -> None:
    """Post events as JSON to an HTTP server.

    With a secret, from --secret-file or $MASKCAST_WEBHOOK_SECRET, requests are signed.

    Example:
      maskcast bridge webhook tcp://127.0.0.1:5555 https://example.org/hook --on zone_entered
    """
    from maskcast.pipeline.clients.secret import read_secret
    from maskcast.pipeline.clients.webhook import EVENTS, run_webhook
    from maskcast.pipeline.log import configure

    configure()
    run_webhook(
        endpoint,
        url,
        sources=source,
        events=EVENTS if on is None else [name.strip() for name in on.split(",")],
        secret=read_secret(secret_file, "MASKCAST_WEBHOOK_SECRET"),
        server_key=server_key,
        client_key=client_key,
    )


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
    return f"{tally.received} frames received{problems}"
