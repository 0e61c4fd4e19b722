"""Fleet: makes the configurations of a cluster's workers and gateway from one configuration."""

from __future__ import annotations

from msgspec.structs import replace

from maskcast.engines.bundle import open_bundle
from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.gateway_process import GatewaySettings
from maskcast.pipeline.configuration.config import (
    ClusterConfig,
    Config,
    CurveConfig,
    OutputConfig,
    PublishConfig,
    SourceConfig,
)
from maskcast.pipeline.sources.open import check_source
from maskcast.pipeline.url import scheme
from maskcast.pipeline.validation import check_config
from maskcast.pipeline.wire.endpoint import check_endpoint


def check_fleet(config: Config) -> tuple[ClusterConfig, PublishConfig]:
    """Check the configuration of a cluster before it runs; return the sections cluster and publish.

    Raises:
        InputError: one is missing, or a key is not possible in a cluster; the message names it.
    """
    if config.cluster is None:
        raise InputError("cluster: missing; add cluster: {gateway: tcp://127.0.0.1:5555}")
    for endpoint in (config.cluster.gateway, config.cluster.gateway_sources):
        if endpoint is not None:
            check_endpoint(endpoint, "tcp://127.0.0.1:5555")
    if config.publish is None:
        raise InputError("publish: null: the workers of a cluster publish; remove it")
    if config.publish.endpoint != PublishConfig().endpoint:
        raise InputError("publish.endpoint: not used in a cluster; set cluster.gateway instead")
    if config.publish.wait_subscribers:
        raise InputError("publish.wait_subscribers: not possible in a cluster; remove it")
    if config.outputs != OutputConfig():
        raise InputError(
            "outputs: not possible in a cluster, where each source may run on any node; "
            "use maskcast record with the gateway's endpoint"
        )
    for source in config.sources:
        check_placeable(source)
    sources = [replace(source, required=False) for source in config.sources]
    manifest = open_bundle(config.model.bundle).manifest
    check_config(replace(config, cluster=None, sources=tuple(sources)), manifest)
    return config.cluster, config.publish


def check_placeable(source: SourceConfig) -> None:
    """Check a source before it is placed. Files and devices can be checked only on their node.

    Raises:
        InputError: its URL is malformed or its scheme unknown.
    """
    if scheme(source.url) not in ("", "file"):
        check_source(source)


def gateway_settings(config: Config, address: str) -> GatewaySettings:
    """Return the settings of the gateway.

    Args:
        config: the configuration of the cluster.
        address: the address at which the nodes reach this machine.
    """
    assert config.cluster is not None
    assert config.publish is not None
    host = f"[{address}]" if ":" in address else address
    sources = config.cluster.gateway_sources or f"tcp://{host}:*"
    return GatewaySettings(config.cluster.gateway, sources, config.publish.curve)


def worker_config(config: Config, source: SourceConfig, gateway: str) -> Config:
    """Return the configuration of a source's worker.

    Args:
        config: the configuration of the cluster.
        source: the source.
        gateway: the endpoint at which the gateway receives.
    """
    assert config.publish is not None
    curve = config.publish.curve
    if curve is not None:
        # `maskcast keys new` writes NAME.key next to NAME.key_secret. Workers use the gateway's own
        # pair, because no subscriber connects to them.
        gateway_key = curve.gateway_key or curve.secret_key.removesuffix("_secret")
        curve = CurveConfig(secret_key=curve.secret_key, gateway_key=gateway_key)
    gateways = (gateway, *config.publish.gateways)
    publish = replace(config.publish, gateways=gateways, curve=curve)
    return replace(
        config,
        sources=(source,),
        publish=publish,
        outputs=OutputConfig(),
        metrics=None,
        control=None,
        cluster=None,
    )
