"""``maskcast gateway``: runs a gateway until stopped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.signals import stopping_on_signals
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.subscriber.receiver import read_client_keys
from maskcast.pipeline.wire.server_keys import ServerKeys

_POLL_S = 0.1


def run_gateway(
    publish: str,
    sources: str | None,
    upstream: Sequence[str],
    *,
    secret_key: Path | None,
    allowed_clients: Path | None,
    allowed_publishers: Path | None,
    server_key: Path | None,
    metrics: str | None,
) -> None:
    """Run a gateway until SIGINT or SIGTERM.

    Raises:
        InputError: an endpoint cannot be used, a key cannot be read or is missing.
    """
    others = {
        "--allowed-clients": allowed_clients,
        "--allowed-publishers": allowed_publishers,
        "--server-key": server_key,
    }
    if secret_key is None and any(others.values()):
        given = next(option for option, value in others.items() if value)
        raise InputError(f"{given}: the gateway has no key; give --secret-key too")
    if secret_key is not None and not any(others.values()):
        raise InputError(f"--secret-key: not used; give {' or '.join(others)}, or leave it out")

    def server_keys(
        allowed: Path | None, purpose: Literal["subscribe", "publish"]
    ) -> ServerKeys | None:
        return ServerKeys.read(secret_key, allowed, purpose) if secret_key and allowed else None

    gateway = Gateway(
        publish,
        sources,
        upstream=upstream,
        keys=server_keys(allowed_clients, "subscribe"),
        source_keys=server_keys(allowed_publishers, "publish"),
        upstream_keys=read_client_keys(server_key, secret_key if server_key else None),
    )
    with stopping_on_signals() as stop, ExitStack() as closing:
        closing.enter_context(gateway)
        if metrics is not None:
            from maskcast.pipeline.cluster.metrics import make_gateway_registry
            from maskcast.pipeline.monitor.server import MetricsServer

            registry = make_gateway_registry(gateway.stats)
            closing.callback(MetricsServer(metrics, registry, gateway.health).close)
        received = ", ".join(filter(None, (gateway.sources_endpoint, *upstream)))
        typer.echo(f"gateway: {received} -> {gateway.endpoint}", err=True)
        while not stop.is_set() and not gateway.wait(_POLL_S):
            pass
