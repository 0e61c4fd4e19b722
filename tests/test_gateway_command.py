"""``maskcast gateway`` as real processes that are killed, and what subscribers receive."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from keyring import new_client
from ports import find_free_port
from publishers import NAMES, frame, seen
from witnesses import wait_until

import maskcast
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame
from maskcast.pipeline.wire.curve import new_keys

ROOT = Path(maskcast.__file__).parents[1]


def maskcast_command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "maskcast", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


class GatewayProcess:
    """``maskcast gateway`` on addresses that stay the same."""

    def __init__(self) -> None:
        self.sources, self.publish = (f"tcp://127.0.0.1:{find_free_port()}" for _ in range(2))
        self.metrics = f"127.0.0.1:{find_free_port()}"
        self._process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        self._process = maskcast_command(
            "gateway",
            *("--sources", self.sources, "--publish", self.publish, "--metrics", self.metrics),
            *options,
        )
        assert self._process.stderr is not None
        shown = self._process.stderr.readline()
        assert shown == f"gateway: {self.sources} -> {self.publish}\n", shown

    def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.communicate(timeout=60)
        return self._process.returncode

    def read(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.metrics}{path}") as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    gateway = GatewayProcess()
    gateway.start()
    yield gateway
    gateway.close()


def test_after_a_gateway_was_killed_the_subscriber_continues_and_counts_what_it_lost(
    gateway: GatewayProcess,
) -> None:
    with (
        Publisher("", NAMES, gateways=[gateway.sources]) as publisher,
        subscribe(gateway.publish, "cam1", policy="all", timeout_s=60) as frames,
    ):
        numbers: list[int] = []

        def publish() -> int:
            numbers.append(publisher.publish(frame(), seen()).seq)
            return frames.tally.received

        publisher.event("cam1", "state", state="streaming")
        wait_until(lambda: publish() > 0)
        first = frames.receive().seq
        gateway.end(signal.SIGKILL)
        wait_until(lambda: publisher.answer_subscriptions() or not publisher.subscribers("cam1"))
        for _ in range(5):
            publish()
        before = frames.tally.received
        gateway.start()
        wait_until(lambda: publish() > before)
        publisher.event("cam1", "ended", reason="stopped")
        wait_until(lambda: frames.tally.received + frames.tally.lost == len(numbers) - first)
        assert frames.tally.lost >= 5
        assert [frame.label_names for frame in frames] == [NAMES] * (frames.tally.received - 1)


PUBLISH = """
import sys, threading, time
from publishers import NAMES, frame, seen
from maskcast.pipeline.publisher.publisher import Publisher
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
with Publisher("", NAMES, gateways=sys.argv[1:]) as publisher:
    while not over.wait(0.02):
        sent = publisher.publish(frame(), seen()).seq + 1
    publisher.event("cam1", "ended", reason="stopped")
print(sent)
"""


def publishing_process(*gateways: GatewayProcess) -> subprocess.Popen[str]:
    """Start a publisher; it ends with its standard input, and prints how many frames it sent."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests/reference"))
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, *(gateway.sources for gateway in gateways)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


class Listening:
    """A subscriber to some gateways that reads all frames on a thread of its own."""

    def __init__(self, *gateways: GatewayProcess) -> None:
        endpoints = [gateway.publish for gateway in gateways]
        self.subscription = subscribe(endpoints, policy="all", timeout_s=120)
        self.frames: list[PublishedFrame] = []
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self.subscription.open()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.subscription.close()
        self._thread.join()

    def _read(self) -> None:
        self.frames.extend(self.subscription)

    def join(self) -> None:
        """Wait until the source has ended."""
        self._thread.join(120)
        assert not self._thread.is_alive()

    def wait_for_both(self) -> None:
        """Wait until two gateways deliver each frame."""
        before = self.subscription.tally.duplicate
        wait_until(lambda: self.subscription.tally.duplicate >= before + 10)

    def wait_for_more(self) -> None:
        before = self.subscription.tally.received
        wait_until(lambda: self.subscription.tally.received >= before + 10)


def test_a_subscriber_of_two_gateways_loses_nothing_when_one_is_killed(
    gateway: GatewayProcess,
) -> None:
    second = GatewayProcess()
    second.start()
    publisher = publishing_process(gateway, second)
    try:
        with Listening(gateway, second) as listening:
            listening.wait_for_both()
            gateway.end(signal.SIGKILL)
            listening.wait_for_more()
            gateway.start()
            listening.wait_for_both()
            second.end(signal.SIGKILL)
            listening.wait_for_more()
            assert listening.subscription.tally.lost == 0

            # Nobody is left to deliver frames: those are lost, and every one is counted.
            gateway.end(signal.SIGKILL)
            second.start()
            listening.wait_for_more()
            sent = int(publisher.communicate(timeout=60)[0])
            listening.join()
    finally:
        publisher.kill()
        publisher.wait(60)
        second.close()
    others = listening.frames[1:]
    assert sum(frame.lost_before for frame in others) == listening.subscription.tally.lost > 0
    for before, after in itertools.pairwise(listening.frames):
        assert after.seq == before.seq + 1 + after.lost_before
    assert listening.frames[-1].seq == sent - 1
    assert not any(frame.restarted for frame in listening.frames)


def test_after_a_publisher_was_killed_its_successor_shows_as_a_restart(
    gateway: GatewayProcess,
) -> None:
    running: list[subprocess.Popen[str]] = []

    def publish() -> None:
        running.append(publishing_process(gateway))

    try:
        with subscribe(gateway.publish, policy="all", timeout_s=60) as frames:
            publish()
            first = frames.receive()
            running[0].kill()
            running[0].wait(60)
            publish()
            others = [next(frame for frame in frames if frame.publisher != first.publisher)]
            others += [frames.receive() for _ in range(10)]
            assert [frame.restarted for frame in others] == [True] + [False] * 10
            assert frames.tally.lost == 0
    finally:
        for process in running:
            process.kill()
            process.communicate(timeout=60)


def test_keys_on_both_sides_by_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    for name in ("gateway", "workers/worker"):
        new_keys(tmp_path / name)
    new_client(tmp_path / "clients/door", "door")
    gateway = GatewayProcess()
    folders = ("--allowed-publishers", str(tmp_path / "workers"))
    folders += ("--allowed-clients", str(tmp_path / "clients"))
    gateway.start("--secret-key", str(tmp_path / "gateway.key_secret"), *folders)
    keys = ("--secret-key", str(tmp_path / "workers/worker.key_secret"))
    keys += ("--gateway-key", str(tmp_path / "gateway.key"))
    sources = ("test://64x48@10", "test://64x48@10", "--name", "door", "--name", "yard")
    try:
        with (
            maskcast_command("run", *sources, "--gateway", gateway.sources, *keys) as run,
            subscribe(
                gateway.publish,
                policy="all",
                timeout_s=120,
                server_key=tmp_path / "gateway.key",
                client_key=tmp_path / "clients/door.key_secret",
            ) as frames,
        ):
            assert {frames.receive().source for _ in range(10)} == {"door"}
            run.terminate()
            run.communicate(timeout=60)
    finally:
        gateway.close()


def test_a_gateway_shows_its_figures_and_ends_by_a_signal(gateway: GatewayProcess) -> None:
    with (
        Publisher("", NAMES, gateways=[gateway.sources]) as publisher,
        subscribe(gateway.publish, "cam1") as frames,
    ):

        def is_received() -> bool:
            publisher.publish(frame(), seen())
            return frames.tally.received > 0

        wait_until(is_received)
        metrics = gateway.read("/metrics")
        assert "maskcast_gateway_publishers 1.0" in metrics
        assert "maskcast_gateway_lost_total 0.0" in metrics
        assert '"healthy":true' in gateway.read("/healthz")
    assert gateway.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give --sources"),
        (["--sources", "nonsense"], "invalid endpoint"),
        (["--sources", "tcp://127.0.0.1:0", "--allowed-clients", "x"], "give --secret-key"),
        (["--sources", "tcp://127.0.0.1:0", "--secret-key", "x"], "--secret-key: not used"),
    ],
)
def test_a_mistake_is_reported_in_one_line(arguments: list[str], problem: str) -> None:
    with maskcast_command("gateway", *arguments) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert problem in errors
    assert errors.count("\n") == 1


def test_a_run_publishes_to_a_gateway(gateway: GatewayProcess) -> None:
    options = ("--limit", "5", "--gateway", gateway.sources, "--wait-subscribers", "1")
    with (
        subscribe(gateway.publish, policy="all", timeout_s=120) as frames,
        maskcast_command("run", "test://64x48@10", *options) as run,
    ):
        received = [frame.seq for frame in frames]
        run.communicate(timeout=120)
        assert frames.tally.lost == 0
    assert run.returncode == 0
    assert received
    assert received == list(range(received[0], received[-1] + 1))
