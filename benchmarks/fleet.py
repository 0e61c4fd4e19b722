"""Measure what 1,000 and 10,000 sources cost in a tree of gateways, and compute what they need.

Run: ``python -m benchmarks.fleet [--sources 1000 10000] [--rate 500] [--fps 10] [--json]``.

There is no engine. Two processes publish messages of ``--instances`` instances of all sources in
turn, ``--rate`` per second in total. Each is connected to a gateway of its own, a third gateway is
connected to those two, and a subscriber to the third: all in processes of their own, over TCP on
this machine. When all messages are sent, a second subscriber measures how long it takes until it
knows the state of every source.

Measured: messages sent, received and reported lost; processor time and bytes per message in each
part. Computed from that, and marked as such: what a core carries, and how many cores, gateways and
how much network ``--fps`` frames per second of each source need.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe

PUBLISHERS = 2
LOCAL = "tcp://127.0.0.1:0"
QUIET_S = 20.0
"""A subscriber stops after this time without a message."""

FULL = 0.7
"""Share of a core that a part may need, so that bursts do not queue."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one run.

    Attributes:
        sources: number of sources.
        rate: messages per second that were offered.
        sent: messages sent.
        received: messages that the subscriber received.
        lost: messages that it reports as lost.
        bytes: size of a message.
        publish_us: processor time of a publisher per message, microseconds; encoding included.
        leaf_us: of a gateway that publishers connect to.
        root_us: of the gateway that is connected to those.
        subscribe_us: of the subscriber; decoding is not included.
        join_s: until a new subscriber knew the state of all sources.
        root_mb: peak resident memory of the last gateway.
    """

    sources: int
    rate: float
    sent: int
    received: int
    lost: int
    bytes: float
    publish_us: float
    leaf_us: float
    root_us: float
    subscribe_us: float
    join_s: float
    root_mb: float


@dataclass(frozen=True, slots=True)
class Computed:
    """What a number of sources needs, computed from a run.

    Attributes:
        sources: number of sources.
        fps: frames per second of each.
        messages: messages per second of all.
        publish_cores: cores for publishing alone, on all machines together.
        leaves: gateways that publishers connect to, each on a core.
        root: share of a core that one gateway behind those needs; above 1 there is no such gateway,
            and subscribers connect to the others.
        mbit_s: network to one subscriber of everything.
    """

    sources: int
    fps: float
    messages: float
    publish_cores: float
    leaves: int
    root: float
    mbit_s: float


def make_instances(count: int) -> Instances:
    """Make instances with person-shaped masks."""
    boxes = np.tile(np.float32([100, 100, 180, 300]), (count, 1))
    scores, labels = np.full(count, 0.9, np.float32), np.ones(count, np.int32)
    crops = np.zeros((count, 28, 28), np.uint8)
    crops[:, 4:24, 8:20] = 255
    return Instances(1280, 720, boxes, scores, labels, crops)


def names_of(publisher: int, sources: int) -> list[str]:
    """Return the names of a publisher's sources."""
    return [f"s{number}" for number in range(publisher, sources, PUBLISHERS)]


def publish(
    pipe: Connection, gateway: str, names: list[str], instances: int, rate: float, count: int
) -> None:
    """Announce all sources, then publish ``count`` messages of them in turn."""
    found, image = make_instances(instances), av.VideoFrame(64, 48)
    with Publisher("", ("background", "person"), gateways=[gateway]) as publisher:
        publisher.wait_for_subscribers(1, QUIET_S, names[:1])
        for name in names:
            publisher.event(name, "state", state="streaming", reconnects=0)
            time.sleep(0.0005)  # a real fleet does not start 10,000 sources in one burst
        pipe.send(None)
        pipe.recv()
        began_cpu_s, began_s = time.process_time(), time.monotonic()
        for number in range(count):
            name, index = names[number % len(names)], number // len(names)
            publisher.publish(Frame(name, index, index / 25, time.time_ns(), image), found)
            time.sleep(max(0.0, began_s + (number + 1) / rate - time.monotonic()))
        cpu_s = time.process_time() - began_cpu_s
        pipe.send(cpu_s)
        pipe.recv()


def run_gateway(pipe: Connection, upstream: list[str]) -> None:
    """Run a gateway; answer each request with its processor time, bytes, messages and memory."""
    with Gateway(LOCAL, None if upstream else LOCAL, upstream=upstream) as gateway:
        pipe.send((gateway.sources_endpoint, gateway.endpoint))
        while pipe.recv():
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            stats = gateway.stats()
            pipe.send((time.process_time(), stats.bytes, stats.messages, memory_mb))


def listen(pipe: Connection, endpoint: str, expected: int) -> None:
    """Receive ``expected`` messages, or until no more arrive."""
    received, cpu_s = 0, 0.0
    with subscribe(endpoint, policy="all", timeout_s=QUIET_S, until_ended=False) as subscription:
        pipe.send(None)
        pipe.recv()
        try:
            for _ in subscription:
                received += 1
                if received == 1:
                    began_s = time.process_time()
                cpu_s = time.process_time() - began_s
                if received + subscription.tally.lost >= expected:
                    break
        except TimeoutError:
            pass
        pipe.send((received, subscription.tally.lost, cpu_s))


def time_to_join(endpoint: str, sources: int) -> float:
    """Return the seconds until a new subscriber knows the state of every source."""
    began_s, known = time.monotonic(), set[str]()
    with subscribe(
        endpoint, policy="all", events=True, timeout_s=QUIET_S, until_ended=False,
        high_water_mark=100_000,
    ) as subscription:  # fmt: skip
        for item in subscription:
            known.add(item.source)
            if len(known) == sources:
                return time.monotonic() - began_s
    raise AssertionError("unreachable: the loop ends only by an error")


def measure(sources: int, rate: float, seconds: float, instances: int) -> Measured:
    """Run a tree of gateways with this many sources."""
    count = round(rate * seconds / PUBLISHERS)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as closing:

        def start(target: object, *arguments: object) -> Connection:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *arguments))  # type: ignore[arg-type]
            process.start()
            theirs.close()
            closing.callback(process.join)
            closing.callback(ours.close)
            return ours

        def ask(gateway: Connection) -> tuple[float, int, int, float]:
            gateway.send(True)
            answer: tuple[float, int, int, float] = gateway.recv()
            return answer

        leaves = [start(run_gateway, []) for _ in range(PUBLISHERS)]
        for leaf in leaves:
            closing.callback(leaf.send, False)
        endpoints = [leaf.recv() for leaf in leaves]
        root = start(run_gateway, [published for _, published in endpoints])
        closing.callback(root.send, False)
        _, address = root.recv()
        listener = start(listen, address, PUBLISHERS * count)
        listener.recv()
        publishers = [
            start(publish, endpoint, names_of(number, sources), instances, rate / PUBLISHERS, count)
            for number, (endpoint, _) in enumerate(endpoints)
        ]
        for publisher in publishers:
            publisher.recv()
        gateways = [*leaves, root]
        before = [ask(gateway) for gateway in gateways]
        listener.send(None)
        for publisher in publishers:
            publisher.send(None)
        publish_s = sum(publisher.recv() for publisher in publishers)
        received, lost, listen_s = listener.recv()
        after = [ask(gateway) for gateway in gateways]
        join_s = time_to_join(address, sources)
        for publisher in publishers:
            publisher.send(None)
    spent_s = [b[0] - a[0] for a, b in zip(before, after, strict=True)]
    passed = [b[2] - a[2] for a, b in zip(before, after, strict=True)]
    sent = PUBLISHERS * count
    return Measured(
        sources=sources,
        rate=rate,
        sent=sent,
        received=received,
        lost=lost,
        bytes=(after[-1][1] - before[-1][1]) / max(1, passed[-1]),
        publish_us=publish_s / sent * 1e6,
        leaf_us=sum(spent_s[:-1]) / max(1, sum(passed[:-1])) * 1e6,
        root_us=spent_s[-1] / max(1, passed[-1]) * 1e6,
        subscribe_us=listen_s / max(1, received) * 1e6,
        join_s=join_s,
        root_mb=after[-1][3],
    )


def compute(run: Measured, fps: float) -> Computed:
    """Compute what the sources of a run need at ``fps`` frames per second each."""
    messages = run.sources * fps
    return Computed(
        sources=run.sources,
        fps=fps,
        messages=messages,
        publish_cores=messages * run.publish_us / 1e6,
        leaves=math.ceil(messages * run.leaf_us / 1e6 / FULL),
        root=messages * run.root_us / 1e6 / FULL,
        mbit_s=messages * run.bytes * 8 / 1e6,
    )


def main() -> None:
    """Run, and print what was measured and what is computed from it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[1000, 10_000], metavar="N")
    parser.add_argument("--rate", type=float, default=500, help="messages per second in total")
    parser.add_argument("--seconds", type=float, default=10, help="how long messages are sent")
    parser.add_argument("--instances", type=int, default=3, help="instances in each message")
    parser.add_argument("--fps", type=float, default=10, help="frames per second that are computed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    runs = [
        measure(sources, options.rate, options.seconds, options.instances)
        for sources in options.sources
    ]
    needs = [compute(run, options.fps) for run in runs]
    if options.json:
        shown = {"measured": list(map(asdict, runs)), "computed": list(map(asdict, needs))}
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    for title, rows in (("measured", runs), ("computed from it", needs)):
        table = Table(title, *(f"{row.sources} sources" for row in rows))
        for figure in list(asdict(rows[0]))[1:]:
            table.add_row(figure, *(f"{getattr(row, figure):.4g}" for row in rows))
        Console().print(table)


if __name__ == "__main__":
    main()
