"""Validation: checks a configuration before it runs."""

from __future__ import annotations

from maskcast.engines.bundle import Manifest
from maskcast.engines.errors import InputError
from maskcast.pipeline.address import split_address
from maskcast.pipeline.configuration.config import Config, PublishConfig
from maskcast.pipeline.control.server import check_control, control_config, secret_key_of
from maskcast.pipeline.outputs.outputs import check_outputs
from maskcast.pipeline.sources.open import check_source
from maskcast.pipeline.stages.infer import labels_of
from maskcast.pipeline.stages.publish import read_keys
from maskcast.pipeline.tracking.regions import check_labels
from maskcast.pipeline.wire.endpoint import check_endpoint


def check_config(config: Config, manifest: Manifest) -> None:
    """Check a configuration without loading a model, opening a connection or writing a file.

    Args:
        config: what is to run.
        manifest: the manifest of the model that will run.

    Raises:
        InputError: a required source is invalid (see ``check_source``), an output cannot be written
            or is an input, an address is malformed, anyone could control the run, a key cannot be
            read, a package is missing, the model does not have a class, or the configuration is
            for a cluster.
    """
    if config.cluster is not None:
        raise InputError(
            "cluster: this configuration is for a cluster; start it with maskcast cluster run, or "
            "remove this section"
        )
    for source in config.sources:
        if source.required:
            check_source(source)
    check_outputs(config)
    if config.publish is not None:
        _check_publish(config.publish)
    if config.control is not None:
        check_control(control_config(config.control), secret_key_of(config))
    if config.tracing is not None:
        # Imported here: most pipelines have no tracing.
        from maskcast.pipeline.monitor.tracing import check_tracing_packages

        check_tracing_packages()
    if config.metrics is not None:
        split_address(config.metrics.address, "metrics", "127.0.0.1:9100")
    labels_of(config.model.classes, manifest.labels)
    for source in config.sources:
        check_labels((*source.zones, *source.lines), manifest.labels, source.name or source.url)


def _check_publish(publish: PublishConfig) -> None:
    check_endpoint(publish.endpoint, "tcp://*:5555")
    for gateway in publish.gateways:
        check_endpoint(gateway, "tcp://host:5556")
    read_keys(publish)
