"""The command ``maskcast ctl``: lists, adds and removes the sources of a running pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.options import ClientKey, ServerKey

Name = Annotated[str, typer.Argument(metavar="NAME", help="The source's name.")]


def mount(app: typer.Typer) -> None:
    """Add the command to the program."""
    ctl = typer.Typer(help="List, add and remove sources of a running pipeline.")
    ctl.callback(subcommand_metavar="list|add|remove ...")(connect)
    ctl.command("list")(list_sources)
    ctl.command("add")(add)
    ctl.command("remove")(remove)
    app.add_typer(ctl, name="ctl", no_args_is_help=True)


def connect(
    context: typer.Context,
    endpoint: Annotated[
        str, typer.Argument(metavar="ENDPOINT", help="The control endpoint of the run.")
    ],
    timeout_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Wait S seconds for an answer.")
    ] = 5.0,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
) -> None:
    """List, add and remove sources of `maskcast run --control ENDPOINT`."""
    if context.resilient_parsing:
        return
    from maskcast.pipeline.control.client import ControlClient

    context.obj = ControlClient(endpoint, timeout_s, server_key=server_key, client_key=client_key)


def list_sources(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the sources with their states and figures."""
    import msgspec

    from maskcast.pipeline.control.client import source_lines

    sources = context.obj.list()
    if as_json:
        typer.echo(msgspec.json.encode(sources))
        return
    for line in source_lines(sources):
        typer.echo(line)


def add(
    context: typer.Context,
    name: Name,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A file, URL or device, like SOURCE of run.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="latest (drop old frames) or block."),
    ] = None,
    every_nth: Annotated[
        int | None, typer.Option(metavar="N", help="Process every N-th frame.")
    ] = None,
    max_fps: Annotated[
        float | None, typer.Option(metavar="FPS", help="Process at most FPS frames per second.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Repeat a file when it ends.")] = False,
    rtsp_transport: Annotated[
        str | None, typer.Option(metavar="KIND", help="RTSP transport: tcp or udp.")
    ] = None,
    open_timeout_s: Annotated[
        float | None, typer.Option(metavar="S", help="Give up opening after S seconds.")
    ] = None,
    read_timeout_s: Annotated[
        float | None, typer.Option(metavar="S", help="Reconnect after S seconds without data.")
    ] = None,
    optional: Annotated[
        bool, typer.Option("--optional", help="Do not report this source in /healthz.")
    ] = False,
) -> None:
    """Add a source and report its state; the exit code is 2 if it has failed.

    A camera that does not answer has not failed: it is retried.
    """
    from maskcast.pipeline.control.client import describe_added
    from maskcast.pipeline.url import is_local, local_path

    if is_local(url):
        url = str(local_path(url).absolute())  # the pipeline may run in another folder
    options: dict[str, Any] = {
        "policy": policy,
        "every_nth": every_nth,
        "max_fps": max_fps,
        "loop": loop or None,
        "rtsp_transport": rtsp_transport,
        "open_timeout_s": open_timeout_s,
        "read_timeout_s": read_timeout_s,
        "required": False if optional else None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    found = context.obj.add({"name": name, "url": url, **given})
    if found is None:
        typer.echo(f"{name}: added, then removed by another client")
    else:
        typer.echo(describe_added(found))


def remove(context: typer.Context, name: Name) -> None:
    """Remove a source and wait until its last frame is published."""
    if not context.obj.remove(name):
        raise InputError(
            f"{name}: not removed yet, because a read from it hangs; list the sources again later"
        )
    typer.echo(f"{name}: removed")
