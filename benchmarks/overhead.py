"""Measure what the pipeline itself costs: processor time of a run against that of its parts alone.

Run: ``python -m benchmarks.overhead CLIP [--sources 1 4 16] [--modes latency throughput]
[--limit 200] [--repeat 3] [--plain] [--threads] [--json]``.

Decoding, resizing, the engine and encoding are measured alone, on all frames of the clip, before
and after each run; a subscriber receives the messages in another process. Every source is the same
clip, is tracked, and has a zone and a line, unless ``--plain``. The overhead is the processor time
per frame of the run divided by the sum of the parts, minus 1. Other work on the machine changes it
less than wall time.

Between the run and the second measurement of the parts, the parts also run at the same time, each
on a thread that does nothing else ("together"). They then take longer than one after another,
because they share caches and cores and because threads of the engine wait for one another. The
second figure is the overhead over these.

``--threads`` prints the processor time of each of the run's threads.

Each round is reported on stderr when it ends. In a round the engine sees the frames of all sources
twice: with 16 sources and a limit of 200 these are 6400 frames, which take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.load import load_engine
from maskcast.engines.memory import limit_heaps
from maskcast.pipeline.cli.profile.alone import encode_alone, measure_file
from maskcast.pipeline.cli.profile.profile import run_pipeline
from maskcast.pipeline.cli.profile.report import ProcessorTimes, processor_times
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.configuration.zones import LineConfig, ZoneConfig
from maskcast.pipeline.sources.open import create_source


def make_sources(clip: str, count: int, *, plain: bool) -> list[SourceConfig]:
    """Return ``count`` sources that all read the clip."""
    names = [f"clip{number}" for number in range(count)]
    if plain:
        return [SourceConfig(url=clip, name=name, track=False) for name in names]
    zone = ZoneConfig(name="middle", polygon=((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)))
    line = LineConfig(name="half", points=((0.5, 0.0), (0.5, 1.0)))
    return [SourceConfig(url=clip, name=name, zones=(zone,), lines=(line,)) for name in names]


def run_together(engine: Any, sources: Sequence[SourceConfig], limit: int) -> float:
    """Run the parts at the same time, each on a bare thread; return the processor time, seconds.

    Raises:
        BaseException: the first error of a part. The others are abandoned, as they wait for it.
    """
    shape, threshold = engine.manifest.input, engine.manifest.score_threshold
    decoded: queue.Queue[Any] = queue.Queue(len(sources))
    resized: queue.Queue[Any] = queue.Queue(engine.max_batch)
    detected: queue.Queue[Any] = queue.Queue(1)

    def decode(config: SourceConfig) -> None:
        with create_source(config) as source:
            for frame in islice(source, limit):
                decoded.put(frame)
        decoded.put(None)

    def resize() -> None:
        for _ in sources:
            while (frame := decoded.get()) is not None:
                resized.put(fit_image(frame.decoded, frame.rotation, shape))
        resized.put(None)

    def detect() -> None:
        last = False
        while not last:
            batch: list[NetworkImage | None] = [resized.get()]
            while batch[-1] is not None and len(batch) < engine.max_batch and not resized.empty():
                batch.append(resized.get())
            last = batch[-1] is None
            if images := [image for image in batch if image is not None]:
                detected.put(engine.detect(images, threshold))
        detected.put(None)

    def segment() -> None:
        while (detections := detected.get()) is not None:
            for instances in engine.segment(detections):
                encode_alone(instances, engine.manifest.keypoints)

    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    parts = [*(partial(decode, source) for source in sources), resize, detect, segment]
    began_s = time.process_time()
    for part in parts:
        threading.Thread(target=run, args=(part,), daemon=True).start()
    for _ in parts:
        if (error := ended.get()) is not None:
            raise error
    return time.process_time() - began_s


@contextmanager
def counting_threads() -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that returns the processor time, in seconds, of threads that have ended."""
    spent: Counter[str] = Counter()
    run = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def counted(thread: threading.Thread) -> None:
        try:
            run(thread)
        finally:
            spent[thread.name.partition(" ")[0]] += time.thread_time()

    threading.Thread._bootstrap_inner = counted  # type: ignore[attr-defined]
    try:
        yield lambda: dict(spent)
    finally:
        threading.Thread._bootstrap_inner = run  # type: ignore[attr-defined]


class Measured(NamedTuple):
    """Measurements of one round.

    Attributes:
        times: of a run and of its parts, milliseconds per frame.
        together: of the parts at the same time, milliseconds per frame.
        threads: of the run's threads, milliseconds per frame, by name.
    """

    times: ProcessorTimes
    together: float
    threads: dict[str, float]

    @property
    def over_parts(self) -> float:
        """Overhead over the parts one after another, percent."""
        return 100 * self.times.overhead

    @property
    def over_together(self) -> float:
        """Overhead over the parts at the same time, percent."""
        return 100 * (self.times.run / self.together - 1)


def measure(engine: Any, sources: Sequence[SourceConfig], limit: int) -> Measured:
    """Measure the parts, a run, the parts at the same time, and the parts again."""
    stop, threshold = threading.Event(), engine.manifest.score_threshold

    def measure_alone() -> Any:
        frames = slice(0, limit, 1)
        return measure_file(sources[0], engine, threshold, frames, stop, lambda _: None)

    alone = measure_alone()
    with counting_threads() as spent:
        stats, spent_s = run_pipeline(sources, engine, threshold, limit, None, stop, lambda _: None)
        of_threads = spent()
    assert stats.processed == len(sources) * alone.frames, "frames were lost"
    together_s = run_together(engine, sources, limit)
    alone += measure_alone()
    of_threads["others"] = spent_s - sum(of_threads.values())
    count = stats.processed
    return Measured(
        processor_times(count, spent_s, alone),
        1e3 * together_s / count,
        {name: 1e3 * seconds / count for name, seconds in sorted(of_threads.items())},
    )


def measure_rounds(
    engine: Any, sources: Sequence[SourceConfig], limit: int, repeat: int, name: str
) -> list[Measured]:
    """Measure several rounds; report each on stderr, as they take minutes with many sources."""
    rounds = []
    for number in range(1, repeat + 1):
        began_s = time.monotonic()
        rounds.append(measure(engine, sources, limit))
        print(
            f"{name}, round {number} of {repeat}: overhead {rounds[-1].over_parts:.1f} %, "
            f"took {time.monotonic() - began_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rounds


def _shown(percent: Sequence[float]) -> str:
    each = ", ".join(f"{one:.1f}" for one in percent)
    return f"{statistics.median(percent):.1f} % ({each})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip")
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", default=["latency", "throughput"])
    parser.add_argument("--limit", type=int, default=200, help="frames of each source")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="no tracks, zones and lines")
    parser.add_argument("--threads", action="store_true", help="processor time of each thread")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    limit_heaps()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for mode in arguments.modes:
        engine = load_engine(mode=mode)
        for count in arguments.sources:
            sources = make_sources(arguments.clip, count, plain=arguments.plain)
            name = f"{mode}, {count} sources"
            rounds = measure_rounds(engine, sources, arguments.limit, arguments.repeat, name)
            over_parts = [one.over_parts for one in rounds]
            over_together = [one.over_together for one in rounds]
            middle = sorted(rounds, key=lambda one: one.over_parts)[len(rounds) // 2]
            times = middle.times
            if arguments.json:
                parts = {name: getattr(times, name) for name in times.__struct_fields__}
                found = {"percent": over_parts, "percent_over_together": over_together}
                found |= {"ms": parts, "together_ms": middle.together, "threads_ms": middle.threads}
                print(json.dumps({"mode": mode, "sources": count, **found}), flush=True)
                continue
            print(
                f"{mode:10} {count:2} sources: overhead {_shown(over_parts)}, "
                f"over the parts together {_shown(over_together)}; "
                f"run {times.run:.2f} ms, together {middle.together:.2f}, "
                f"alone {times.alone:.2f}: decode {times.decode:.2f}, resize {times.resize:.2f}, "
                f"engine {times.engine:.2f}, encode {times.encode:.3f}",
                flush=True,
            )
            if arguments.threads:
                each = ", ".join(f"{name} {ms:.2f}" for name, ms in middle.threads.items())
                print(f"  {each}", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
