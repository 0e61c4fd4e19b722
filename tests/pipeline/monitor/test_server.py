import http.client
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from ports import find_free_port
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.monitor import health, server
from maskcast.pipeline.monitor.health import Health
from maskcast.pipeline.monitor.server import MAX_CLIENTS, MetricsServer
from maskcast.pipeline.pipeline import Pipeline


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_for(url: str, status: int, within_s: float = 60) -> dict[str, Any]:
    """Request a page until it has this status; return its body."""
    deadline_s = time.monotonic() + within_s
    while True:
        code, body = get(url)
        if code == status:
            found: dict[str, Any] = json.loads(body)
            return found
        assert time.monotonic() < deadline_s, body
        time.sleep(0.05)


@contextmanager
def running(engine, port: int, *sources: dict[str, Any]) -> Iterator[str]:
    """Run a pipeline that serves metrics; yield their address."""
    config = make_config(
        {
            "sources": sources,
            "publish": None,
            "metrics": {"address": f"127.0.0.1:{port}"},
        }
    )
    pipeline = Pipeline(config, engine)
    pipeline.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        pipeline.stop()
        pipeline.join()


@pytest.fixture
def healthy() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Gauge("temperature", "A gauge of the tests.", registry=registry).set(42)
    server = MetricsServer("127.0.0.1:0", registry, lambda: Health(True, [], {"a": "streaming"}))
    yield server
    server.close()


def test_a_running_pipeline_is_scraped_over_http(timed_engine, free_port) -> None:
    with running(timed_engine(0.005), free_port, {"url": "test://64x48@50"}) as url:
        wait_for(f"{url}/healthz", 200)
        deadline_s = time.monotonic() + 60
        while 'maskcast_frames_processed_total{source="test"} 0.0' in get(f"{url}/metrics")[1]:
            assert time.monotonic() < deadline_s
        code, text = get(f"{url}/metrics")
        assert code == 200
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("source", "test") == "test"
        }
        assert samples["maskcast_frames_processed_total"] > 0
        while get(f"{url}/metrics")[1] == text:
            assert time.monotonic() < deadline_s
    with pytest.raises(urllib.error.URLError):  # it ended with the pipeline
        get(f"{url}/metrics")


def test_a_camera_that_goes_away_is_unhealthy_until_it_is_back(
    timed_engine, free_port, rtsp_server
) -> None:
    metrics_port = find_free_port()
    sources = [
        {"url": rtsp_server.url, "name": "door", "read_timeout_s": 1.5},
        {"url": "test://64x48@10", "name": "yard"},
    ]
    rtsp_server.start()
    with running(timed_engine(0.005), metrics_port, *sources) as url:
        wait_for(f"{url}/healthz", 200)
        rtsp_server.signal(signal.SIGSTOP)
        found = wait_for(f"{url}/healthz", 503)
        (problem,) = found["problems"]
        assert problem.startswith("door is ")
        assert found["sources"]["yard"] == "streaming"
        assert (
            'maskcast_source_state{source="door",state="streaming"} 0' in get(f"{url}/metrics")[1]
        )
        rtsp_server.stop()
        time.sleep(0.3)
        rtsp_server.start()
        assert wait_for(f"{url}/healthz", 200)["healthy"]


def test_an_engine_that_hangs_is_unhealthy(timed_engine, free_port, monkeypatch) -> None:
    monkeypatch.setattr(health, "STUCK_AFTER_S", 0.5)
    engine = timed_engine(0.001)
    with running(engine, free_port, {"url": "test://64x48@50"}) as url:
        wait_for(f"{url}/healthz", 200)
        engine.detect_s = 3.0
        found = wait_for(f"{url}/healthz", 503)
        stuck = "infer has been at work on one item for "
        assert any(problem.startswith(stuck) for problem in found["problems"])
        engine.detect_s = 0.0
        wait_for(f"{url}/healthz", 200)


def test_there_are_two_pages(healthy: MetricsServer) -> None:
    assert "temperature 42.0" in get(f"{healthy.url}/metrics")[1]
    assert get(f"{healthy.url}/healthz") == (
        200,
        '{"healthy":true,"problems":[],"sources":{"a":"streaming"},"outputs":{}}\n',
    )
    assert get(f"{healthy.url}/secrets")[0] == 404
    assert "temperature 42.0" in get(f"{healthy.url}/metrics?name[]=temperature")[1]


def test_a_client_that_sends_nothing_does_not_hold_up_the_others(healthy: MetricsServer) -> None:
    port = int(healthy.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):
        assert get(f"{healthy.url}/healthz")[0] == 200


def test_slow_clients_do_not_delay_others(healthy: MetricsServer) -> None:
    port = int(healthy.url.rpartition(":")[2])
    slow: deque[socket.socket] = deque()
    for _ in range(1000):
        if len(slow) == 200:  # enough to fill the server six times
            slow.popleft().close()
        slow.append(socket.create_connection(("127.0.0.1", port)))
        slow[-1].send(b"GET /met")
    stopping = threading.Event()

    def drip() -> None:
        """Send one byte at a time on all connections, and replace those that are closed."""
        while not stopping.wait(0.05):
            for _ in range(len(slow)):
                client = slow.popleft()
                try:
                    client.send(b"r")
                except OSError:
                    client.close()
                    client = socket.create_connection(("127.0.0.1", port))
                slow.append(client)

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        for _ in range(10):
            assert get(f"{healthy.url}/healthz")[0] == 200
            assert "temperature 42.0" in get(f"{healthy.url}/metrics")[1]
    finally:
        stopping.set()
        dripping.join()
        for client in slow:
            client.close()


def test_one_client_too_many_disconnects_the_oldest(healthy: MetricsServer) -> None:
    port = int(healthy.url.rpartition(":")[2])
    with ExitStack() as flood:
        clients = [
            flood.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(MAX_CLIENTS + 1)
        ]
        clients[0].settimeout(30)
        assert clients[0].recv(1) == b""
        clients[1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        clients[1].settimeout(30)
        assert clients[1].recv(100).startswith(b"HTTP/1.0 200")


def test_a_request_has_one_deadline(healthy: MetricsServer, monkeypatch) -> None:
    monkeypatch.setattr(server, "DEADLINE_S", 0.5)
    with socket.create_connection(("127.0.0.1", int(healthy.url.rpartition(":")[2]))) as client:
        client.settimeout(0.05)
        deadline_s = time.monotonic() + 30
        while True:  # a byte now and then does not prolong it
            assert time.monotonic() < deadline_s
            try:
                client.send(b"G")
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break


def test_nothing_can_be_written(healthy: MetricsServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(healthy.url.rpartition(":")[2]))
    connection.request("POST", "/metrics", body="x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_port_that_is_in_use_is_reported_in_one_line(healthy: MetricsServer) -> None:
    address = healthy.url.removeprefix("http://")
    with pytest.raises(InputError, match=rf"^{address} is in use: "):
        MetricsServer(address, CollectorRegistry(), lambda: Health(True, [], {}))


def test_a_pipeline_that_cannot_serve_metrics_closes_what_it_was_given(
    timed_engine, healthy: MetricsServer
) -> None:
    closed = []

    class Log:
        def write(self, *_: object) -> None: ...

        def close(self) -> None:
            closed.append(True)

    config = make_config(
        {
            "sources": [{"url": "test://64x48@50"}],
            "metrics": {"address": healthy.url.removeprefix("http://")},
        }
    )
    with pytest.raises(InputError, match="is in use"):
        Pipeline(config, timed_engine(), recorders=[Log()]).start()
    assert closed == [True]


def test_an_address_that_the_network_can_reach_is_a_warning(caplog) -> None:
    MetricsServer("*:0", CollectorRegistry(), lambda: Health(True, [], {})).close()
    (record,) = caplog.records
    assert record.getMessage() == "metrics_public"
    assert "anyone on the network can read this" in record.fields["advice"]
    caplog.clear()
    MetricsServer("localhost:0", CollectorRegistry(), lambda: Health(True, [], {})).close()
    assert caplog.text == ""
