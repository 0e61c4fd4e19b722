"""``maskcast view``, and ``maskcast run --view``."""

from __future__ import annotations

from pathlib import Path

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.run import run_to_end
from maskcast.pipeline.clients.view.listener import Listener
from maskcast.pipeline.clients.view.process import ViewProcess, check_packages
from maskcast.pipeline.config import Config
from maskcast.pipeline.config_file import override

JPEG_QUALITY = 80
"""Quality of the images that ``--view`` adds, unless the configuration has one."""


def show_page(
    endpoint: str, http: str, token: str | None, server_key: Path | None, client_key: Path | None
) -> None:
    """Serve the page until interrupted.

    Raises:
        InputError: a package is missing, an address or key is invalid, or a token is needed.
    """
    check_packages()
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    subscription = subscribe_for_view(endpoint, server_key, client_key)
    with subscription:
        pass  # an endpoint that cannot be connected to is reported now
    listener = Listener(http, token)
    _print_url(listener.url, listener.access.needs_token)
    ViewServer(subscription, listener).run()


def run_with_view(config: Config, http: str, limit: int | None) -> None:
    """Run a pipeline, with images in its messages, and serve the view in a process of its own.

    Raises:
        InputError: as ``run_to_end`` and ``ViewProcess`` do; or the messages are encrypted, or are
            not published.
    """
    publish = config.publish
    if publish is None:
        raise InputError("--view: nothing is published; give --publish ENDPOINT")
    if publish.gateways:
        raise InputError("--view: the messages go to a gateway; give maskcast view its endpoint")
    if publish.curve is not None:
        raise InputError(
            "--view: the messages are encrypted; start maskcast view with --server-key and "
            "--client-key, and give this run --jpeg-quality"
        )
    if publish.jpeg_quality is None:
        config = override(config, {"publish.jpeg_quality": JPEG_QUALITY})
    with ViewProcess(publish.endpoint, http) as process:
        _print_url(process.url, process.needs_token)
        run_to_end(config, limit=limit, note=process.note)


def _print_url(url: str, needs_token: bool) -> None:
    note = ""
    if needs_token:
        url += "#token=TOKEN"
        note = "  (with your token; plain HTTP, so use it in networks that you trust)"
    typer.echo(f"view: {url}{note}", err=True)
