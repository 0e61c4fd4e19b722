"""``maskcast view`` and ``maskcast run --view``: serve the browser view."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.run import run_to_end
from maskcast.pipeline.clients.view.listener import Listener
from maskcast.pipeline.clients.view.process import ViewProcess, check_packages
from maskcast.pipeline.configuration.config import Config, CurveConfig, PublishConfig
from maskcast.pipeline.configuration.config_file import override
from maskcast.pipeline.wire.curve import new_keys, read_key_pair, write_public_key
from maskcast.pipeline.wire.rights import ClientRights, write_rights

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
    print_url(listener.url, listener.access.needs_token)
    ViewServer(subscription, listener).run()


def run_with_view(config: Config, http: str, limit: int | None) -> None:
    """Run a pipeline, with images in its messages, and serve the view in a process of its own.

    If the messages are encrypted, the view gets a key of its own, which is valid for this run.

    Raises:
        InputError: as ``run_to_end`` and ``ViewProcess`` do; or the messages are not published.
    """
    publish = config.publish
    if publish is None:
        raise InputError("--view: nothing is published; give --publish ENDPOINT")
    if publish.gateways:
        raise InputError("--view: the messages go to a gateway; give maskcast view its endpoint")
    with ExitStack() as closing:
        config, keys = prepare_view(config, publish, closing)
        process = closing.enter_context(ViewProcess(publish.endpoint, http, *keys))
        print_url(process.url, process.needs_token)
        run_to_end(config, limit=limit, note=process.note)


def prepare_view(
    config: Config, publish: PublishConfig, closing: ExitStack
) -> tuple[Config, tuple[Path | None, Path | None]]:
    """Add images to the messages, and a key for the view if they are encrypted.

    Args:
        config: what is to run.
        publish: its ``publish`` section.
        closing: deletes the view's key when it is closed.

    Returns:
        The configuration, and the files of the publisher's and the view's keys.

    Raises:
        InputError: the publisher's key cannot be read.
    """
    if publish.jpeg_quality is None:
        config = override(config, {"publish.jpeg_quality": JPEG_QUALITY})
    if publish.curve is None:
        return config, (None, None)
    folder = Path(closing.enter_context(TemporaryDirectory(prefix="maskcast-view-")))
    return admit_view(config, publish.curve, folder)


def admit_view(
    config: Config, curve: CurveConfig, folder: Path
) -> tuple[Config, tuple[Path, Path]]:
    """Make a key for the view of this run and allow it in addition to the configured clients.

    Args:
        config: what is to run.
        curve: its ``publish.curve`` section.
        folder: where to write the key, readable by this user only.

    Returns:
        The configuration, and the files of the publisher's and the view's keys.

    Raises:
        InputError: the publisher's key cannot be read.
    """
    server = write_public_key(folder / "server.key", read_key_pair(curve.secret_key).public)
    public, secret = new_keys(folder / "view")
    write_rights(public, ClientRights(sources=("*",), control=False))
    given = curve.allowed_clients or ()
    allowed = [given] if isinstance(given, str) else list(given)
    changed = {"publish.curve.allowed_clients": [*allowed, str(public)]}
    return override(config, changed), (server, secret)


def print_url(url: str, needs_token: bool) -> None:
    """Print the page's URL."""
    note = ""
    if needs_token:
        url += "#token=TOKEN"
        note = "  (with your token; plain HTTP, so use it only on networks that you trust)"
    typer.echo(f"view: {url}{note}", err=True)
