"""Measure the publisher's delay with 1, 10 and 100 subscribers, and with one of them stopped.

Run: ``python -m benchmarks.subscribers [--counts 1 10 100] [--frames 600] [--fps 100] [--json]``.
Frames of 100 instances (81 kB), TCP on this machine, subscribers in processes of up to 25. The
stopped one is a process of its own, stopped (SIGSTOP) after the first frame and continued after the
last. Actual losses are messages that were sent and not received; reported losses are those in the
subscribers' tallies. Both must be equal for each subscriber.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe

SOURCE = "camera"
IN_ONE_PROCESS = 25
TIMEOUT_S = 120.0
ARRIVAL_S = 0.5

Counts = list[tuple[int, int]]
"""Messages received, and reported as lost, by each subscriber."""


@dataclass(frozen=True, slots=True)
class Row:
    """Measurements with a number of subscribers.

    Attributes:
        reading: subscribers that read.
        stopped: subscribers that were stopped.
        sent: messages sent.
        p50_ms: median duration of ``publish``.
        p99_ms: 99th percentile.
        max_ms: maximum.
        cpu_max_ms: maximum processor time of a call. The rest of ``max_ms`` was spent waiting, for
            a processor only if ``waits`` is 0.
        waits: how often calls went to sleep.
        memory_growth_mb: of the publisher's process, from the first frame to the last.
        lost_by_readers: messages that the reading subscribers did not receive, in total.
        lost_by_stopped: messages that the stopped ones did not receive, in total.
        reported: losses reported by all subscribers, in total.
        exact: whether each subscriber reported exactly its losses.
    """

    reading: int
    stopped: int
    sent: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_max_ms: float
    waits: int
    memory_growth_mb: float
    lost_by_readers: int
    lost_by_stopped: int
    reported: int
    exact: bool


def read(endpoint: str, count: int, results: Connection) -> None:
    """Subscribe ``count`` times and send what each received and lost; runs in its own process."""
    with ExitStack() as stack:
        subscriptions = [
            stack.enter_context(subscribe(endpoint, SOURCE, timeout_s=TIMEOUT_S))
            for _ in range(count)
        ]
        for subscription in subscriptions:
            for _ in subscription:  # meanwhile the others receive on their own threads
                pass
        tallies = [subscription.tally for subscription in subscriptions]
    results.send([(tally.received, tally.lost) for tally in tallies])


@contextmanager
def reading(endpoint: str, count: int) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run ``read`` in a process, which does not outlive the block."""
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=read, args=(endpoint, count, sender), daemon=True)
    process.start()
    sender.close()
    try:
        yield process, results
    finally:
        process.kill()
        process.join()


def measure(count: int, stopped: int, frames: int, fps: float) -> Row:
    """Publish to ``count`` subscribers that read and ``stopped`` that do not."""
    instances = hundred_instances()
    decoded = av.VideoFrame(64, 48)
    with Publisher("tcp://127.0.0.1:0", ["background", "thing"]) as publisher, ExitStack() as stack:
        sizes = [min(IN_ONE_PROCESS, count - at) for at in range(0, count, IN_ONE_PROCESS)]
        readers = [stack.enter_context(reading(publisher.endpoint, size)) for size in sizes]
        asleep = [stack.enter_context(reading(publisher.endpoint, 1)) for _ in range(stopped)]
        if not publisher.wait_for_subscribers(count + stopped, TIMEOUT_S, [SOURCE]):
            raise TimeoutError(f"{count + stopped} subscribers did not connect")
        before_mb, next_s = _memory_mb(), time.perf_counter()
        took_ms, cpu_ms, waits = np.zeros(frames), np.zeros(frames), 0
        for index in range(frames):
            if index == 1:
                time.sleep(ARRIVAL_S)  # losses are counted from the first message on
                _signal(asleep, signal.SIGSTOP)
            frame = Frame(SOURCE, index, None, time.time_ns(), decoded)
            waits -= _sleeps()
            cpu_start, start = time.thread_time(), time.perf_counter()
            publisher.publish(frame, instances)
            took_ms[index] = (time.perf_counter() - start) * 1e3
            cpu_ms[index] = (time.thread_time() - cpu_start) * 1e3
            waits += _sleeps()
            next_s = max(next_s + 1 / fps, time.perf_counter())
            time.sleep(max(next_s - time.perf_counter(), 0))
        growth_mb = _memory_mb() - before_mb
        _signal(asleep, signal.SIGCONT)
        of_readers = _finish(publisher, [results for _, results in readers])
        of_stopped = _finish(publisher, [results for _, results in asleep])
    all_counts = of_readers + of_stopped
    return Row(
        reading=count,
        stopped=stopped,
        sent=frames,
        p50_ms=round(float(np.percentile(took_ms, 50)), 3),
        p99_ms=round(float(np.percentile(took_ms, 99)), 3),
        max_ms=round(float(took_ms.max()), 3),
        cpu_max_ms=round(float(cpu_ms.max()), 3),
        waits=waits,
        memory_growth_mb=round(growth_mb, 1),
        lost_by_readers=sum(frames - received for received, _ in of_readers),
        lost_by_stopped=sum(frames - received for received, _ in of_stopped),
        reported=sum(lost for _, lost in all_counts),
        exact=all(lost == frames - received for received, lost in all_counts),
    )


def hundred_instances() -> Instances:
    """Make 100 instances with masks, for a message of 81 kB."""
    boxes = np.tile(np.array([4, 4, 40, 40], np.float32), (100, 1))
    ones = np.ones(100, np.float32)
    crops = np.full((100, 28, 28), 255, np.uint8)
    return Instances(64, 48, boxes, ones, ones.astype(np.int32), crops)


def table(rows: list[Row]) -> Table:
    """Format the rows as a table."""
    title = "publish() in ms (cpu: computing, at most), and messages lost"
    shown = Table(title=title, box=None, padding=(0, 0, 0, 1))
    for column in ("readers", "stopped", "p50", "p99", "max", "cpu", "waits", "MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for column in ("lost", "by stopped", "reported"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times = (row.p50_ms, row.p99_ms, row.max_ms, row.cpu_max_ms)
        lost = (row.lost_by_readers, row.lost_by_stopped, row.reported)
        cells = (row.reading, row.stopped, *times, row.waits, row.memory_growth_mb, *lost)
        shown.add_row(*map(str, cells))
    return shown


def _signal(processes: list[tuple[BaseProcess, Connection]], number: signal.Signals) -> None:
    for process, _ in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


def _finish(publisher: Publisher, waiting: list[Connection]) -> Counts:
    """Publish ``ended`` until all subscribers have received it; return their counts."""
    counts: Counts = []
    for results in waiting:
        deadline = time.monotonic() + TIMEOUT_S
        while not results.poll(0.1):
            if time.monotonic() > deadline:
                raise TimeoutError("a subscriber did not receive the ended event")
            publisher.event(SOURCE, "ended")
        counts += results.recv()
    return counts


def _sleeps() -> int:
    """Return the number of voluntary context switches of this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure and print; exit with 1 if a loss was not reported."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--fps", type=float, default=100.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        measure(count, stopped, options.frames, options.fps)
        for count in options.counts
        for stopped in (0, 1)
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        Console().print(table(rows))
    if not all(row.exact for row in rows):
        sys.exit("a subscriber's losses are not those that it reported")


if __name__ == "__main__":
    main()
