"""MQTT bridge: forwards changes of counts and states, and events, to an MQTT broker."""

from __future__ import annotations

import json
import logging
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.url import redact

if TYPE_CHECKING:
    from paho.mqtt.client import Client

INTERVAL_S = 0.5
"""Minimum interval between two updates of the values, seconds."""

MAX_QUEUED = 1000
"""Maximum number of messages that wait for the broker; further events are lost, values follow."""

MAX_TOPICS = 4096
"""Maximum number of values; further ones, of sources or zones that a publisher invents, are left
out."""

_UNSPECIFIED = 0x80
"""Reason code of a connection that broke; paho calls it "Unspecified error"."""

EVENTS = ("zone_entered", "zone_left", "line_crossed", "track_ended")

_STATUS = "status"
"""Topic of the bridge's own status; topics of values contain a slash."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Broker:
    """An MQTT broker.

    Attributes:
        host: its name or address.
        port: its port, usually 1883, or 8883 with TLS.
        prefix: first part of all topics.
        user: the user's name, or None.
        tls: whether the connection is encrypted.
        password: the user's password, or None.
        ca_file: PEM file of the CA that signed the broker's certificate; None for the system's CAs.
    """

    host: str
    port: int
    prefix: str
    user: str | None
    tls: bool
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    @classmethod
    def parse(cls, url: str, password: str | None = None, ca_file: Path | None = None) -> Broker:
        """Parse "mqtt://[user@]host[:port]/prefix", or "mqtts://…" for TLS.

        Raises:
            InputError: the URL has another form, or contains a password.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        except ValueError:  # an invalid port, or an invalid address in brackets
            parts, port = urlsplit(""), 0
        prefix = parts.path.strip("/")
        if parts.password is not None:
            raise InputError("MQTT broker: password in the URL; use --password-file")
        is_topic = prefix and not set(prefix) & set("+#\0")
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or not port or not is_topic:
            raise InputError(f"MQTT broker {redact(url)!r}: expected mqtt://HOST[:PORT]/PREFIX")
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname, port, prefix, parts.username, tls, password, ca_file)


class MqttBridge:
    """Publishes changed values, retained, and events. A context manager.

    Args:
        broker: the broker; it may start later, and is reconnected automatically.
        discovery: Home Assistant's discovery prefix; None sends no discovery.

    Attributes:
        lost: number of events that did not fit into the queue.

    Raises:
        InputError: the package or the certificate is missing.
    """

    def __init__(self, broker: Broker, discovery: str | None = "homeassistant") -> None:
        self._broker, self._discovery = broker, discovery
        self._values: dict[str, str] = {_STATUS: "online"}  # the current ones
        self._sent: dict[str, str] = {}  # those that the broker has, or that wait for it
        self._sent_at_s = 0.0
        self._connected = threading.Event()
        self._fresh = threading.Event()  # connected since the last flush
        self._reported = ""
        self.lost = 0
        self._client = self._new_client()

    def __enter__(self) -> MqttBridge:
        self._client.connect_async(self._broker.host, self._broker.port, keepalive=10)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._connected.is_set():
            sent = self._client.publish(self._status, "offline", qos=1, retain=True)
            with suppress(ValueError, RuntimeError):  # the queue is full, or the connection is lost
                sent.wait_for_publish(2)
        self._client.disconnect()
        self._client.loop_stop()

    def add(self, item: PublishedFrame | StreamEvent) -> None:
        """Take a frame or an event, without waiting for the broker."""
        source = item.source
        if isinstance(item, PublishedFrame):
            found = Counter(
                item.label_names[label] if label < len(item.label_names) else str(label)
                for label in item.instances.labels.tolist()
            )
            for topic in self._values:
                if topic.startswith(f"{source}/labels/"):
                    self._values[topic] = "0"
            for name, count in found.items():
                self._set(f"{source}/labels/{name}", str(count))
            for zone, count in item.zones.items():
                self._set(f"{source}/zones/{zone}", str(count))
            for line, crossings in item.lines.items():
                for direction, total in crossings.items():
                    self._set(f"{source}/lines/{line}/{direction}", str(total))
        elif item.name in ("state", "ended"):
            state = str(item.data.get("state", "")) if item.name == "state" else "ended"
            self._set(f"{source}/state", state)
            if state != "streaming":  # there is nothing to count
                for topic in self._values:
                    if topic.startswith((f"{source}/zones/", f"{source}/labels/")):
                        self._values[topic] = "0"
        elif item.name in EVENTS:
            time_ns = item.data.get("capture_ns", item.publish_ns)
            body = json.dumps({"event": item.name, "time_ns": time_ns, "data": item.data})
            name = f"{self._broker.prefix}/{source}/events/{item.name}"
            if not self._publish(name, body):
                self.lost += 1
                _logger.warning("mqtt_event_lost", extra=fields(topic=name, lost=self.lost))

    def flush(self) -> None:
        """Send the values that have changed, every ``INTERVAL_S`` at most.

        Values that do not fit into the queue are sent by a later call.
        """
        now_s = time.monotonic()
        if not self._connected.is_set() or now_s - self._sent_at_s < INTERVAL_S:
            return
        self._sent_at_s = now_s
        if self._fresh.is_set():  # a restarted broker may have forgotten everything
            self._fresh.clear()
            self._sent.clear()
        for topic, value in self._values.items():
            if self._sent.get(topic) == value:
                continue
            if topic not in self._sent and not self._announce(topic):
                return
            if not self._publish(f"{self._broker.prefix}/{topic}", value, retain=True):
                return
            self._sent[topic] = value

    @property
    def _status(self) -> str:
        return f"{self._broker.prefix}/{_STATUS}"

    def _set(self, topic: str, value: str) -> None:
        name = "".join("_" if character in "+#\0" else character for character in topic)
        if name in self._values or len(self._values) < MAX_TOPICS:
            self._values[name] = value

    def _publish(self, topic: str, body: str, *, retain: bool = False) -> bool:
        """Queue a message; return False if the queue is full."""
        from paho.mqtt.enums import MQTTErrorCode

        sent = self._client.publish(topic, body, qos=1, retain=retain)
        return sent.rc != MQTTErrorCode.MQTT_ERR_QUEUE_SIZE

    def _announce(self, topic: str) -> bool:
        """Describe a value to Home Assistant; return False if the queue is full."""
        if self._discovery is None or topic == _STATUS:
            return True
        source, _, rest = topic.partition("/")
        prefix = self._broker.prefix
        unique = "".join(c if c.isalnum() or c in "_-" else "_" for c in f"{prefix}_{topic}")
        settings: dict[str, Any] = {
            "name": rest.replace("/", " "),
            "unique_id": unique,
            "state_topic": f"{prefix}/{topic}",
            "availability_topic": self._status,
            "device": {"identifiers": [f"{prefix}_{source}"], "name": f"{prefix} {source}"},
        }
        if rest != "state":
            settings["state_class"] = "total" if rest.startswith("lines/") else "measurement"
        return self._publish(
            f"{self._discovery}/sensor/{unique}/config", json.dumps(settings), retain=True
        )

    def _new_client(self) -> Client:
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise InputError(
                "the MQTT bridge needs the package paho-mqtt: run pip install 'maskcast[mqtt]'"
            ) from None
        client = Client(CallbackAPIVersion.VERSION2)
        client.max_queued_messages_set(MAX_QUEUED)
        client.reconnect_delay_set(1, 30)
        client.will_set(self._status, "offline", qos=1, retain=True)
        if self._broker.user is not None:
            client.username_pw_set(self._broker.user, self._broker.password)
        if self._broker.tls:
            try:
                client.tls_set(None if self._broker.ca_file is None else str(self._broker.ca_file))
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"{self._broker.ca_file}: no certificate: {error}") from None
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        return client

    def _on_connect(self, _c: Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        if reason.is_failure:
            self._report(str(reason))
            return
        _logger.info("mqtt_connected", extra=fields(host=self._broker.host, port=self._broker.port))
        self._reported = ""
        self._fresh.set()
        self._connected.set()

    def _on_connect_fail(self, _c: Client, _u: Any) -> None:
        # paho calls this while it handles the error: the host, the network or the certificate.
        reason = "the broker cannot be reached"
        self._report(f"{reason}: {error}" if (error := sys.exception()) is not None else reason)

    def _on_disconnect(self, _c: Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        self._connected.clear()
        if reason.is_failure:
            unspecified = reason.value == _UNSPECIFIED
            self._report("the connection was lost" if unspecified else str(reason))

    def _report(self, reason: str) -> None:
        """Log why there is no connection; skip repetitions until there is one."""
        if reason == self._reported:
            return
        self._reported = reason
        shown = fields(host=self._broker.host, port=self._broker.port, reason=reason)
        _logger.warning("mqtt_unreachable", extra=shown)


def run_mqtt(
    endpoint: str,
    broker: Broker,
    *,
    sources: Sequence[str] | None = None,
    discovery: str | None = "homeassistant",
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
) -> None:
    """Forward what a publisher sends until an exception is raised; reconnect to both sides.

    Raises:
        InputError: the endpoint is wrong, or the package is missing.
    """
    arguments: dict[str, Any] = {"server_key": server_key, "client_key": client_key}
    with (
        MqttBridge(broker, discovery) as bridge,
        subscribe(
            endpoint, sources, events=True, policy="all", until_ended=False, **arguments
        ) as received,
    ):
        while True:
            with suppress(TimeoutError):
                bridge.add(received.receive(INTERVAL_S))
            bridge.flush()
