"""Removal: tells subscribers that a source is gone whose worker cannot tell them."""

from __future__ import annotations

from maskcast.engines.bundle import open_bundle
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.stages.publish import make_publisher

CONNECT_WITHIN_S = 2.0


def publish_removed(config: Config) -> None:
    """Publish ``ended`` with the reason ``removed`` for a worker's source, through its gateways.

    Without it, a gateway would announce the source's last state to new subscribers for ever. The
    event is kept for gateways that connect within 2 s; that long it takes if nobody subscribes to
    the source's frames.

    Args:
        config: what the worker ran.

    Raises:
        InputError: a key for the gateways cannot be read.
    """
    assert config.publish is not None
    (source,) = config.sources
    name = source.name or ""
    with make_publisher(config.publish, open_bundle(config.model.bundle).manifest) as publisher:
        publisher.event(name, "ended", reason="removed")
        publisher.wait_for_subscribers(1, CONNECT_WITHIN_S, [name])
