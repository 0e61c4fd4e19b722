"""The command ``maskcast cluster``: sources on the nodes of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskcast.pipeline.cli import control_commands, options

NODE = "Node's name or start of its id."


def mount(app: typer.Typer) -> None:
    """Add the command to the program."""
    cluster = typer.Typer(help="Run sources on a Ray cluster; list, add, remove and move them.")
    cluster.callback()(connect)
    cluster.command("run")(run)
    cluster.command("status")(status)
    cluster.command("add")(control_commands.add)
    cluster.command("remove")(control_commands.remove)
    cluster.command("move")(move)
    app.add_typer(cluster, name="cluster", no_args_is_help=True)


def connect(
    context: typer.Context,
    control: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="The control endpoint (the user's own socket)."),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Wait S seconds for an answer.")
    ] = 30.0,
    server_key: options.ServerKey = None,
    client_key: options.ClientKey = None,
) -> None:
    """Run sources on a Ray cluster; list, add, remove and move them.

    Needs pip install 'maskcast[cluster]'.
    """
    if context.resilient_parsing:
        return
    from maskcast.pipeline.cli.cluster.status import default_control
    from maskcast.pipeline.control.client import ControlClient

    endpoint = control or default_control()
    if context.invoked_subcommand == "run":
        context.obj = endpoint
    else:
        context.obj = ControlClient(
            endpoint,
            timeout_s,
            server_key=server_key,
            client_key=client_key,
            command="maskcast cluster run --config FILE",
        )


def run(
    context: typer.Context,
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="Configuration with a section `cluster`, YAML.")
    ],
    address: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="local: start a cluster here; auto; ray://HOST:PORT."),
    ] = "local",
    metrics: options.Metrics = None,
    view: options.View = False,
    view_http: options.ViewHttp = None,
    log_level: options.LogLevel = "warning",
    log_format: options.LogFormat = "text",
) -> None:
    """Keep sources running on the nodes of a cluster until stopped.

    Examples:
      maskcast cluster run --config fleet.yaml
      maskcast cluster run --config fleet.yaml --address ray://head:10001
    """
    from maskcast.pipeline.cli.cluster.run import run_cluster
    from maskcast.pipeline.configuration.config_file import load_config
    from maskcast.pipeline.log import configure

    configure(log_level, log_format)
    http = view_http or (options.VIEW_HTTP if view else None)
    settings = load_config(config, {"metrics.address": metrics})
    run_cluster(settings, address, context.obj, http)


def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the nodes, the gateway and the sources of a running cluster."""
    import msgspec

    from maskcast.pipeline.cli.cluster.status import status_lines

    cluster, sources = context.obj.status()
    if as_json:
        shown = {
            "nodes": cluster.nodes,
            "gateway": cluster.gateway,
            "sources": sources,
        }
        typer.echo(msgspec.json.encode(shown))
        return
    for line in status_lines(cluster, sources):
        typer.echo(line)


def move(
    context: typer.Context,
    name: control_commands.Name,
    node: Annotated[str, typer.Argument(metavar="NODE", help=NODE)],
) -> None:
    """Move a source to another node."""
    found = context.obj.move(name, node)
    typer.echo(f"{name}: moved, {found.state} on {found.node}")
