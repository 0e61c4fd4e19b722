from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from certificates import Authority
from paho.mqtt.enums import CallbackAPIVersion
from ports import find_free_port
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients import mqtt as bridges
from maskcast.pipeline.clients.mqtt import Broker, MqttBridge
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.received import StreamEvent

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


class Mosquitto:
    """A broker on a free port, with a password.

    Args:
        folder: Folder for its files.
        tls: Lines of its configuration that set TLS up.
    """

    def __init__(self, folder: Path, tls: str = "") -> None:
        self.port = find_free_port()
        passwords = folder / "passwords"
        tool = str(Path(str(MOSQUITTO)).with_name("mosquitto_passwd"))
        tool = tool if Path(tool).exists() else "/usr/bin/mosquitto_passwd"
        subprocess.run([tool, "-b", "-c", str(passwords), "me", "word"], check=True)
        passwords.chmod(0o644)
        folder.chmod(0o755)
        self._config = folder / "mosquitto.conf"
        user = "user root\n"  # it would change to a user who cannot read the folder
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\n{user}"
            f"allow_anonymous false\npassword_file {passwords}\npersistence false\n{tls}"
        )
        self.start()

    def start(self) -> None:
        command = [str(MOSQUITTO), "-c", str(self._config)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(self._accepts)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)

    def _accepts(self) -> bool:
        assert self._process.poll() is None, "mosquitto does not start"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Reader:
    """Collects what is on a broker: the last value of each topic, and how many it had."""

    def __init__(self, port: int, ca_file: Path | None = None) -> None:
        self.values: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.username_pw_set("me", "word")
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self._client.on_message = self._remember
        if ca_file is not None:
            self._client.tls_set(str(ca_file))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def _remember(self, _client: Any, _user: Any, message: mqtt.MQTTMessage) -> None:
        self.values[message.topic] = message.payload.decode()
        self.counts[message.topic] = self.counts.get(message.topic, 0) + 1

    def wait(self, topic: str, value: str) -> None:
        wait_until(lambda: self.values.get(topic) == value)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca.pem")


@pytest.fixture
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto(tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


def test_changes_reach_a_broker_and_survive_its_restart(broker: Mosquitto, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("word\n")
    url = f"mqtt://me@127.0.0.1:{broker.port}/mc"
    reader = Reader(broker.port)
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        command = [sys.executable, "-m", "maskcast", "bridge", "mqtt", publisher.endpoint, url]
        process = subprocess.Popen([*command, "--password-file", str(password)])
        try:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.event("cam1", "state", state="streaming", reconnects=0)
            for index in range(50):
                publisher.publish(frame(index=index), seen(2), zones={"door": 1})
            publisher.event("cam1", "zone_entered", zone="door", track_id=1)
            reader.wait("mc/status", "online")
            reader.wait("mc/cam1/state", "streaming")
            reader.wait("mc/cam1/labels/person", "2")
            reader.wait("mc/cam1/zones/door", "1")
            wait_until(lambda: "mc/cam1/events/zone_entered" in reader.values)
            assert json.loads(reader.values["mc/cam1/events/zone_entered"])["data"]["track_id"] == 1
            assert reader.counts["mc/cam1/zones/door"] < 5  # not one per frame
            settings = json.loads(reader.values["homeassistant/sensor/mc_cam1_zones_door/config"])
            assert settings["state_topic"] == "mc/cam1/zones/door"
            assert settings["availability_topic"] == "mc/status"

            broker.stop()
            reader.values.clear()
            publisher.publish(frame(index=50), seen(1), zones={"door": 3})
            broker.start()  # without the values from before
            reader.wait("mc/cam1/zones/door", "3")
            reader.wait("mc/cam1/state", "streaming")
            publisher.event("cam1", "ended")
            reader.wait("mc/cam1/state", "ended")
            reader.wait("mc/cam1/zones/door", "0")
        finally:
            process.kill()
            process.wait()
        reader.wait("mc/status", "offline")  # the last will
    reader.close()


def test_values_that_do_not_fit_into_the_queue_are_sent_later(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridges, "MAX_QUEUED", 3)
    sources = [f"cam{number}" for number in range(9)]
    reader = Reader(broker.port)
    broker.stop()
    with MqttBridge(Broker("127.0.0.1", broker.port, "mc", "me", False, "word")) as bridge:
        for source in sources:
            bridge.add(event(source, "zone_entered", zone="door"))
            bridge.add(event(source, "state", state="streaming"))
        assert bridge.lost == len(sources) - 3
        broker.start()

        def all_arrived() -> bool:
            bridge.flush()
            values = [reader.values.get(f"mc/{source}/state") for source in sources]
            return {reader.values.get("mc/status"), *values} == {"online", "streaming"}

        wait_until(all_arrived)
    reader.wait("mc/status", "offline")
    reader.close()


def event(source: str, name: str, **data: object) -> StreamEvent:
    return StreamEvent(source, "a" * 16, name, data, 0, 0)


def test_a_broker_with_tls_is_reached_if_its_certificate_is_right(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A real mosquitto, a certificate authority for the test, and the command as a process."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("broker")
    certificate, key = authority.issue("127.0.0.1", folder)
    broker = Mosquitto(folder, f"certfile {certificate}\nkeyfile {key}\n")
    other = Authority(tmp_path / "other.pem")
    password = tmp_path / "password"
    password.write_text("word\n")

    @contextmanager
    def bridge(ca_file: Path, host: str = "127.0.0.1") -> Iterator[subprocess.Popen[str]]:
        url = f"mqtts://me@{host}:{broker.port}/mc"
        command = [sys.executable, "-m", "maskcast", "bridge", "mqtt", publisher.endpoint, url]
        options = ["--password-file", str(password), "--ca", str(ca_file)]
        with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    try:
        with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
            for ca_file, host in ((other.path, "127.0.0.1"), (authority.path, "localhost")):
                with bridge(ca_file, host) as process:
                    assert process.stderr is not None
                    line = process.stderr.readline()
                    process.kill()
                assert "event=mqtt_unreachable" in line
                assert "certificate" in line
            with bridge(authority.path):
                reader = Reader(broker.port, authority.path)
                publisher.event("cam1", "state", state="streaming", reconnects=0)
                reader.wait("mc/status", "online")
                wait_until(
                    lambda: (
                        publisher.answer_subscriptions()
                        or reader.values.get("mc/cam1/state") == "streaming"
                    )
                )
                reader.close()
    finally:
        broker.stop()
    with (
        pytest.raises(InputError, match="no certificate"),
        MqttBridge(Broker.parse("mqtts://host/mc", ca_file=password)),
    ):
        pass


def test_a_broker_that_hangs_up_again_and_again_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        with MqttBridge(Broker("127.0.0.1", server.getsockname()[1], "mc", None, False)):
            for _ in range(3):
                server.accept()[0].close()
    (record,) = [record for record in caplog.records if record.msg == "mqtt_unreachable"]
    assert record.fields["reason"] == "the connection was lost"  # type: ignore[attr-defined]


def test_addresses_are_read_and_wrong_ones_refused() -> None:
    read = Broker.parse("mqtts://me@host/a/b", "word")
    assert (read.host, read.port, read.prefix, read.user) == ("host", 8883, "a/b", "me")
    assert read.tls
    assert "word" not in repr(read)
    assert Broker.parse("mqtt://host:1/x").port == 1
    for url in (
        "http://host/x",
        "mqtt://host",
        "mqtt://host/#",
        "mqtt://host:99999/x",
        "mqtt:///x",
        "mqtt://[::1/x",
    ):
        with pytest.raises(InputError, match="expected mqtt://HOST"):
            Broker.parse(url)
    with pytest.raises(InputError, match="--password-file") as refused:
        Broker.parse("mqtt://me:hunter2@host/x")
    assert "hunter2" not in str(refused.value)
