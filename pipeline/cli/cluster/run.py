"""``maskcast cluster run``: runs sources on a Ray cluster until stopped."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import typer

from maskcast.pipeline.cli.cluster.status import shown_state
from maskcast.pipeline.cli.live_table import LiveTable
from maskcast.pipeline.cli.signals import stopping_on_signals
from maskcast.pipeline.cli.view import prepare_view, print_url
from maskcast.pipeline.clients.view.process import ViewProcess
from maskcast.pipeline.cluster.fleet import check_fleet
from maskcast.pipeline.cluster.ray_cluster import ClusterLostError, RayCluster
from maskcast.pipeline.cluster.supervisor import Supervisor
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.control.messages import SourceReport
from maskcast.pipeline.control.server import ControlServer, control_config, secret_key_of

COLUMNS = ("source", "node", "fps", "processed", "dropped", "restarts", "now")

_SHOW_EVERY_S = 1.0


def run_cluster(config: Config, address: str, control: str, http: str | None) -> None:
    """Run the sources of a configuration on a cluster until SIGINT or SIGTERM.

    Args:
        config: its ``cluster`` is set.
        address: "local", "auto" or "ray://HOST:PORT".
        control: the control endpoint, unless the configuration has one.
        http: where to serve the browser view; None for no view.

    Raises:
        InputError: the configuration cannot be run, or there is no cluster.
        typer.Exit: the cluster is lost; the exit code is 1, so that a service manager tries again.
    """
    try:
        _run_until_stopped(config, address, control, http)
    except ClusterLostError as error:
        typer.echo(f"maskcast: {error}; all sources are stopped, run the command again", err=True)
        raise typer.Exit(1) from None


def _run_until_stopped(config: Config, address: str, control: str, http: str | None) -> None:
    needs, publish = check_fleet(config)
    with ExitStack() as closing:
        keys: tuple[Path | None, Path | None] = (None, None)
        if http is not None:
            config, keys = prepare_view(config, publish, closing)
        # Ray prints messages about lost processes to standard output.
        closing.enter_context(redirect_stdout(sys.stderr))
        cluster = closing.enter_context(
            RayCluster(address, needs.cpus_per_source, needs.gpus_per_source)
        )
        stop = closing.enter_context(stopping_on_signals())  # after Ray, which has its own handler
        supervisor = closing.enter_context(Supervisor(config, cluster))
        note = f"subscribe at {supervisor.endpoint}"
        if http is not None:
            view = closing.enter_context(ViewProcess(supervisor.endpoint, http, *keys))
            print_url(view.url, view.needs_token)
        faults: list[BaseException] = []
        server = ControlServer(
            control_config(config.control or control),
            secret_key_of(config),
            supervisor,
            faults.append,
        )
        server.start()
        closing.callback(server.close)
        if config.metrics is not None:
            from maskcast.pipeline.cluster.cluster_metrics import make_cluster_registry
            from maskcast.pipeline.monitor.server import MetricsServer

            registry = make_cluster_registry(supervisor)
            metrics = MetricsServer(config.metrics.address, registry, supervisor.health)
            closing.callback(metrics.close)
        with LiveTable(note, COLUMNS) as table:
            while not stop.wait(_SHOW_EVERY_S):
                if faults:
                    raise faults[0]
                table.show([_row(source) for source in supervisor.reports()])


def _row(source: SourceReport) -> list[str]:
    state = shown_state(source)
    return [
        source.name,
        source.node or "",
        f"{source.fps:.1f}",
        str(source.processed),
        str(source.dropped),
        str(source.restarts),
        f"{state}: {source.detail}" if source.detail else state,
    ]
