"""Measure what a peer that floods subscriptions costs a publisher and its new subscribers.

Run: ``python -m benchmarks.subscription_flood [--seconds 8] [--reconnect]``. A raw TCP peer in a
process of its own subscribes and cancels in a loop; with ``--reconnect`` it connects again whenever
it is disconnected. Meanwhile a publisher sends 200 frames per second, and a new subscriber connects
in the middle. Reported are the publisher's memory before and after, and how long the new subscriber
waited for its first frame with label names.
"""

from __future__ import annotations

import argparse
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame

TIMEOUT_S = 120.0


def flood(port: int, seconds: float, reconnect: bool) -> None:
    """Subscribe and cancel until the time is up, or the first disconnection."""
    pairs = b"".join(
        b"\x00" + bytes([len(body)]) + body
        for number in range(500)
        for body in (b"\x01v1/x%d/" % (number % 7), b"\x00v1/x%d/" % (number % 7))
    )
    deadline_s, sent, cut = time.monotonic() + seconds, 0, 0
    while time.monotonic() < deadline_s and (reconnect or not cut):
        try:
            with _connect(port) as peer:
                while time.monotonic() < deadline_s:
                    peer.sendall(pairs)
                    sent += 1000
        except OSError:
            cut += 1
            time.sleep(0.02)
    print(f"flooder: {sent:,} messages, disconnected {cut} times", flush=True)


def _connect(port: int) -> socket.socket:
    """Connect and do the handshake of a SUB socket (ZMTP 3.0, without keys)."""
    peer = socket.create_connection(("127.0.0.1", port))
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    missing = 64
    while missing:
        if not (data := peer.recv(missing)):
            raise ConnectionResetError
        missing -= len(data)
    ready = b"\x05READY\x0bSocket-Type" + (3).to_bytes(4, "big") + b"SUB"
    peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
    return peer


def measure(seconds: float, reconnect: bool) -> None:
    """Publish during a flood, and print what it cost."""
    empty = Instances(
        64, 48, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), None
    )
    decoded = av.VideoFrame(64, 48)
    waited_s: list[float] = []

    def subscribe_late(endpoint: str) -> None:
        began_s = time.monotonic()
        with subscribe(endpoint, "cam1", timeout_s=TIMEOUT_S) as frames:
            while not waited_s:
                frame = frames.receive()
                if isinstance(frame, PublishedFrame) and frame.label_names:
                    waited_s.append(time.monotonic() - began_s)

    with Publisher("tcp://127.0.0.1:0", ("background", "person")) as publisher:
        index = 0

        def publish_until(done: Callable[[], bool]) -> None:
            nonlocal index
            while not done():
                publisher.publish(Frame("cam1", index, None, time.time_ns(), decoded), empty)
                index += 1
                due_s = time.monotonic() + 0.005
                while publisher.has_backlog and time.monotonic() < due_s:
                    publisher.answer_subscriptions()
                time.sleep(max(due_s - time.monotonic(), 0))

        def publish_for(duration_s: float) -> None:
            end_s = time.monotonic() + duration_s
            publish_until(lambda: time.monotonic() >= end_s)

        publish_for(1)
        before_mb = memory_mb()
        port = publisher.endpoint.rpartition(":")[2]
        flags = ["--reconnect"] if reconnect else []
        command = [sys.executable, __file__, "--flood", port, "--seconds", str(seconds), *flags]
        flooder = subprocess.Popen(command)
        publish_for(seconds / 2)
        late = threading.Thread(target=subscribe_late, args=(publisher.endpoint,), daemon=True)
        late.start()
        end_s = time.monotonic() + TIMEOUT_S
        publish_until(lambda: flooder.poll() is not None)
        publish_until(lambda: bool(waited_s) or time.monotonic() > end_s)
        print(f"memory {before_mb:.0f} -> {memory_mb():.0f} MB")
        print(f"new subscriber waited {waited_s[0] if waited_s else TIMEOUT_S:.2f} s")


def memory_mb() -> float:
    """Return this process's resident memory, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e3


def main() -> None:
    """Measure, or run as the flooder of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--reconnect", action="store_true")
    parser.add_argument("--flood", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.flood is not None:
        flood(arguments.flood, arguments.seconds, arguments.reconnect)
    else:
        measure(arguments.seconds, arguments.reconnect)


if __name__ == "__main__":
    main()
