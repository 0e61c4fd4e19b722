"""The configurations of a cluster's workers and its gateway, derived from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.fleet import check_fleet, gateway_settings, worker_config
from maskcast.pipeline.cluster.gateway_process import make_gateway
from maskcast.pipeline.configuration.config import Config, OutputConfig
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.stages.publish import read_keys
from maskcast.pipeline.wire.curve import new_keys
from maskcast.pipeline.wire.rights import ClientRights, write_rights

GATEWAY = "tcp://127.0.0.1:7"


def fleet(**sections: Any) -> Config:
    return make_config({"sources": ["test://64x48@1"], "cluster": {}, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cluster": None}, "cluster: missing"),
        ({"cluster": {"gateway": "nowhere"}}, "invalid endpoint 'nowhere'"),
        ({"cluster": {"gateway_sources": "nowhere"}}, "invalid endpoint 'nowhere'"),
        ({"publish": None}, "publish: null"),
        ({"publish": {"endpoint": "tcp://*:1"}}, "publish.endpoint: not used"),
        ({"publish": {"wait_subscribers": 1}}, "publish.wait_subscribers: not possible"),
        ({"outputs": {"save": "a.mp4"}}, "outputs: not possible"),
        ({"metrics": "nowhere"}, "invalid address for metrics"),
        ({"control": "tcp://*:1"}, "anyone on the network could control this"),
        ({"model": {"bundle": "/nowhere"}}, "/nowhere"),
        ({"sources": ["nonsense://camera/1"]}, "unknown scheme 'nonsense'"),
        ({"sources": ["test://64"]}, "test://64"),
    ],
)
def test_what_a_cluster_does_not_have_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_fleet(fleet(**sections))


def test_a_file_may_be_on_the_nodes_alone() -> None:
    cluster, publish = check_fleet(fleet(sources=["/only/on/a/node.mp4"]))
    assert cluster.gateway == "tcp://127.0.0.1:5555"
    assert publish.gateways == ()


def test_a_worker_publishes_one_source_to_all_gateways() -> None:
    config = fleet(publish={"gateways": ["tcp://second:5556"]}, metrics="127.0.0.1:1", control="x")
    (source,) = config.sources
    worker = worker_config(config, source, GATEWAY)
    assert worker.sources == (source,)
    assert worker.publish is not None
    assert worker.publish.gateways == (GATEWAY, "tcp://second:5556")
    assert (worker.metrics, worker.control, worker.cluster) == (None, None, None)
    assert worker.outputs == OutputConfig()


def test_workers_and_gateway_share_a_key_pair_that_subscribers_do_not_have(
    tmp_path: Path,
) -> None:
    public, secret = new_keys(tmp_path / "fleet")
    client, _ = new_keys(tmp_path / "client")
    write_rights(client, ClientRights(sources=("*",)))
    curve = {"secret_key": str(secret), "allowed_clients": [str(client)]}
    config = fleet(publish={"curve": curve})
    check_fleet(config)
    worker = worker_config(config, config.sources[0], GATEWAY)
    assert worker.publish is not None
    read_keys(worker.publish)
    assert worker.publish.curve is not None
    assert worker.publish.curve.gateway_key == str(public)
    settings = gateway_settings(config, "127.0.0.1")
    with make_gateway(settings) as gateway:
        assert gateway.sources_endpoint.startswith("tcp://127.0.0.1:")


def test_workers_find_the_gateway_at_the_address_that_the_nodes_reach() -> None:
    assert gateway_settings(fleet(), "10.0.0.1").sources == "tcp://10.0.0.1:*"
    assert gateway_settings(fleet(), "fd00::1").sources == "tcp://[fd00::1]:*"
    given = fleet(cluster={"gateway_sources": "tcp://10.0.0.2:5556"})
    assert gateway_settings(given, "10.0.0.1").sources == "tcp://10.0.0.2:5556"
