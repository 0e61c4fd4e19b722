"""The removal of a source whose worker is gone, through a real gateway."""

from __future__ import annotations

from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.cluster.removal import publish_removed
from maskcast.pipeline.configuration.config import Config, PublishConfig, SourceConfig
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.subscribe import subscribe

ANY = "tcp://127.0.0.1:0"


def config_of(gateway: Gateway) -> Config:
    return Config(
        sources=[SourceConfig(url="test://", name="cam1")],
        publish=PublishConfig(gateways=[gateway.sources_endpoint]),
    )


def test_subscribers_and_the_gateway_forget_a_source_whose_worker_is_gone() -> None:
    with Gateway(ANY, ANY) as gateway:
        subscription = subscribe(
            gateway.endpoint, policy="all", events=True, until_ended=False, timeout_s=200
        )
        with subscription:
            with Publisher("", NAMES, gateways=[gateway.sources_endpoint]) as publisher:
                assert publisher.wait_for_subscribers(1, 200, ["cam1"])
                publisher.event("cam1", "state", state="streaming")
                publisher.publish(frame(), seen(1))
            wait_until(lambda: gateway.stats().sources == {"cam1": "streaming"})
            publish_removed(config_of(gateway))
            received = iter(subscription)
            for item in received:
                if isinstance(item, StreamEvent) and item.name == "ended":
                    break
            assert item.data == {"reason": "removed"}
            wait_until(lambda: gateway.stats().sources == {})
            with Publisher("", NAMES, gateways=[gateway.sources_endpoint]) as publisher:
                assert publisher.wait_for_subscribers(1, 200, ["cam1"])
                publisher.publish(frame(), seen(1))  # the name is free
                for item in received:
                    if isinstance(item, PublishedFrame):
                        break
                assert item.source == "cam1"


def test_a_gateway_without_subscribers_forgets_the_source_too() -> None:
    with Gateway(ANY, ANY) as gateway:
        with Publisher("", NAMES, gateways=[gateway.sources_endpoint]) as publisher:
            publisher.event("cam1", "state", state="streaming")
            publisher.wait_for_subscribers(1, 0.5, ["cam1"])
            wait_until(lambda: publisher.answer_subscriptions() or gateway.stats().sources)
        publish_removed(config_of(gateway))
        wait_until(lambda: gateway.stats().sources == {})
