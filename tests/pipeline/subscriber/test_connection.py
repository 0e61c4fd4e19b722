"""Recovery where libzmq does not reconnect: refused keys, failed handshakes, long messages."""

import logging
import time

import pytest
from keyring import new_client
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire import reconnecting
from maskcast.pipeline.wire.server_keys import ServerKeys


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(reconnecting, "MAX_BACKOFF_S", 0.2)


@pytest.fixture
def keys(tmp_path):
    """Key pairs "server", "friend" and "stranger": paths without suffix."""
    for name in ("server", "friend", "stranger"):
        new_client(tmp_path / name)
    return tmp_path


def failures(caplog):
    return [r.fields["reason"] for r in caplog.records if r.getMessage() == "subscription_failed"]


def allowing(keys, *names, server="server"):
    return ServerKeys.read(f"{keys}/{server}.key_secret", [f"{keys}/{name}.key" for name in names])


def receives(publisher, frames):
    """Publish until a frame arrives."""

    def received():
        publisher.publish(frame(), seen())
        return frames.tally.received > 0

    wait_until(received)
    return frames.receive().source == "cam1"


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_refused_key_is_reported_once_and_works_as_soon_as_it_is_allowed(keys, caplog, scheme):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{keys}/socket"}[scheme]
    with Publisher(endpoint, NAMES, keys=allowing(keys, "stranger")) as first:
        endpoint = first.endpoint
        frames = subscribe(
            endpoint,
            policy="all",
            server_key=f"{keys}/server.key",
            client_key=f"{keys}/friend.key_secret",
        ).open()
        wait_until(lambda: failures(caplog) != [])
        with pytest.raises(TimeoutError, match="does not allow this client's key"):
            frames.receive(1.5)  # several attempts
    with Publisher(endpoint, NAMES, keys=allowing(keys, "friend")) as second:
        assert receives(second, frames)
    frames.close()
    assert failures(caplog) == ["the publisher does not allow this client's key"]


@pytest.mark.parametrize("without_keys", ["client", "publisher"])
def test_keys_on_one_side_only_are_reported_and_recovered_from(keys, caplog, without_keys):
    given = {
        "client": {},
        "publisher": {
            "server_key": f"{keys}/server.key",
            "client_key": f"{keys}/friend.key_secret",
        },
    }[without_keys]
    secured = allowing(keys, "friend")
    first_keys, then = (secured, None) if without_keys == "client" else (None, secured)
    with Publisher("tcp://127.0.0.1:0", NAMES, keys=first_keys) as first:
        endpoint = first.endpoint
        frames = subscribe(endpoint, policy="all", **given).open()
        wait_until(lambda: failures(caplog) != [])
    with Publisher(endpoint, NAMES, keys=then) as second:
        assert receives(second, frames)
    frames.close()
    assert "one side uses keys" in failures(caplog)[0]


def test_a_wrong_server_key_recovers_when_the_right_publisher_comes(keys):
    with Publisher(
        "tcp://127.0.0.1:0", NAMES, keys=allowing(keys, "friend", server="stranger")
    ) as first:
        endpoint = first.endpoint
        frames = subscribe(
            endpoint,
            policy="all",
            server_key=f"{keys}/server.key",
            client_key=f"{keys}/friend.key_secret",
        ).open()
        with pytest.raises(TimeoutError):
            frames.receive(0.5)
    with Publisher(endpoint, NAMES, keys=allowing(keys, "friend")) as second:
        assert receives(second, frames)
    frames.close()


def test_after_a_part_that_is_too_long_the_next_messages_arrive(script, caplog):
    with subscribe(script.endpoint, policy="all", max_message_bytes=2000) as frames:
        script.wait()
        script.instances(0)
        assert frames.receive().seq == 0
        script.instances(1, jpeg=b"x" * 3000)
        script.wait()  # it subscribes again
        script.instances(2)
        after = frames.receive(60)
        assert (after.seq, after.lost_before) == (2, 1)
        assert frames.tally.malformed == 1
    assert len(failures(caplog)) == 1
    assert "longer than 2000 bytes" in failures(caplog)[0]


def test_a_message_of_short_parts_that_is_too_long_is_discarded_without_a_reconnection(script):
    with subscribe(script.endpoint, policy="all", max_message_bytes=3000) as frames:
        script.wait()
        script.instances(0, jpeg=b"x" * 2000)
        script.instances(1)
        assert frames.receive().seq == 1
        assert frames.tally.malformed == 1


def test_a_publisher_that_goes_away_is_no_failure(caplog):
    caplog.set_level(logging.WARNING)
    with Publisher("tcp://127.0.0.1:0", NAMES) as first:
        endpoint = first.endpoint
        frames = subscribe(endpoint, policy="all").open()
        assert receives(first, frames)
    time.sleep(1.5 * reconnecting.ABANDONED_AFTER_S)
    count = frames.tally.received
    with Publisher(endpoint, NAMES) as second:
        wait_until(lambda: second.publish(frame(), seen()) and frames.tally.received > count)
    frames.close()
    assert frames.tally.malformed == 0
    assert not failures(caplog)
