"""The command ``maskcast ctl``: what sources a running pipeline has, one more, one less."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.options import ClientKey, ServerKey

Name = Annotated[str, typer.Argument(metavar="NAME", help="The source's name.")]


def mount(app: typer.Typer) -> None:
    """Add the command to the program."""
    ctl = typer.Typer(help="Add and remove sources of a `maskcast run --control ENDPOINT`.")
    ctl.callback(subcommand_metavar="list|add|remove ...")(connect)
    ctl.command("list")(list_sources)
    ctl.command("add")(add)
    ctl.command("remove")(remove)
    app.add_typer(ctl, name="ctl", no_args_is_help=True)


def connect(
    context: typer.Context,
    endpoint: Annotated[
        str, typer.Argument(metavar="ENDPOINT", help="What was given to run as --control.")
    ],
    timeout_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Give up when no answer comes for so long.")
    ] = 5.0,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
) -> None:
    """Add and remove sources of a `maskcast run --control ENDPOINT`."""
    if context.resilient_parsing:
        return
    from maskcast.pipeline.cli.control_client import ControlClient

    context.obj = ControlClient(endpoint, timeout_s, server_key=server_key, client_key=client_key)


def list_sources(context: typer.Context) -> None:
    """Show the sources and how they fare."""
    from rich.console import Console

    from maskcast.pipeline.cli.control_client import source_table

    Console().print(source_table(context.obj.list()))


def add(
    context: typer.Context,
    name: Name,
    url: Annotated[str, typer.Argument(metavar="URL", help="As a SOURCE of run.")],
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="latest (drop old frames) or block (lose none)."),
    ] = None,
    every_nth: Annotated[
        int | None, typer.Option(metavar="N", help="Take the first of every so many pictures.")
    ] = None,
    max_fps: Annotated[
        float | None, typer.Option(metavar="FPS", help="Take no more pictures per second.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin a file again when it ends.")] = False,
    rtsp_transport: Annotated[str | None, typer.Option(metavar="KIND", help="tcp or udp.")] = None,
    open_timeout_s: Annotated[
        float | None, typer.Option(metavar="S", help="How long it may take to answer.")
    ] = None,
    read_timeout_s: Annotated[
        float | None, typer.Option(metavar="S", help="Silent for so long, it is opened anew.")
    ] = None,
    optional: Annotated[
        bool, typer.Option("--optional", help="/healthz does not mind if it fails.")
    ] = False,
) -> None:
    """Read one more source, from now on."""
    from maskcast.pipeline.control import AddSource
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
    context.obj.ask(AddSource({"name": name, "url": url, **given}))
    typer.echo("ok")


def remove(context: typer.Context, name: Name) -> None:
    """Take a source away; wait until its last frame and its end are published."""
    if not context.obj.remove(name):
        raise InputError(f"{name} is read no longer, but has not gone yet: a read of it hangs")
    typer.echo("ok")
