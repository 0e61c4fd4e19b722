"""``maskcast run``: runs a pipeline to its end and shows its figures in a live table."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from rich.console import Console

from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.engines.memory import limit_heaps
from maskcast.engines.threads import mark_abandonable
from maskcast.pipeline.cli.live_table import LiveTable
from maskcast.pipeline.cli.signals import stopping_on_signals
from maskcast.pipeline.cli.watch import count_labels
from maskcast.pipeline.configuration.config import Config, OutputConfig
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stages.infer import load_engine_for
from maskcast.pipeline.stats import SourceStats, Stats
from maskcast.pipeline.url import redact
from maskcast.pipeline.validation import check_config

COLUMNS = ("source", "captured", "processed", "dropped", "fps", "latency ms", "now")
WIDE_ONLY = ("captured",)

_POLL_S, _SHOW_EVERY_S = 0.05, 0.2

_LEAVE_AFTER_S = 1.0
"""After a signal, an engine that works for longer than this is abandoned (``maskcast.main``)."""


def run_to_end(
    config: Config, *, limit: int | None = None, note: Callable[[], str] = lambda: ""
) -> Stats:
    """Run a pipeline to its end, or until SIGINT or SIGTERM, and show its figures.

    Args:
        config: what to run.
        limit: maximum number of frames to read from each source; None for all.
        note: returns a text to show below the table.

    Returns:
        The final figures.

    Raises:
        InputError: the configuration cannot be run, or an output is not written at the end.
    """
    limit_heaps()
    bundle = open_bundle(config.model.bundle)
    check_config(config, bundle.manifest)
    with Console(stderr=True).status("loading the model"):
        engine = _load(config, bundle)
    with stopping_on_signals() as stop:
        return _run(config, engine, limit, note, stop)


def _run(
    config: Config,
    engine: Engine,
    limit: int | None,
    note: Callable[[], str],
    stop: threading.Event,
) -> Stats:
    """Run until the end, and close the engine unless it is abandoned."""
    label_names = engine.manifest.labels
    busy = False
    try:
        pipeline = Pipeline(config, engine, limit=limit)
        with LiveTable(f"{engine.manifest.name} on {engine.device}", COLUMNS, WIDE_ONLY) as table:
            pipeline.start()
            shown_s, stopped_s = 0.0, math.inf
            while not pipeline.wait(_POLL_S):
                now_s = time.monotonic()
                if stop.is_set() and stopped_s == math.inf:
                    stopped_s = now_s
                    pipeline.stop()
                elif now_s - stopped_s > _LEAVE_AFTER_S and pipeline.is_published:
                    busy = True
                    sys.exit(0)
                elif now_s - shown_s >= _SHOW_EVERY_S:
                    _show(table, pipeline, label_names, note())
                    shown_s = now_s
            _show(table, pipeline, label_names, note())
            pipeline.join()
        stats = pipeline.stats()
        _check_written(config.outputs, stats)
        return stats
    finally:
        if not busy:
            engine.close()


def _check_written(outputs: OutputConfig, stats: Stats) -> None:
    """Raise InputError for an output that was not being written when the run ended."""
    for name, problem in stats.outputs.items():
        if problem:
            missing = sum(sum(source.unrecorded.values()) for source in stats.sources)
            loss = f"{missing} processed frames are missing" if missing else "it is incomplete"
            raise InputError(f"{getattr(outputs, name)}: cannot be written: {problem}; {loss}")


def _load(config: Config, bundle: Bundle) -> Engine:
    """Load the engine on another thread, so that signals are handled while native code compiles it.

    A thread that is still loading when the program ends is abandoned (``maskcast.main``).
    """
    loaded: Future[Engine] = Future()

    def load() -> None:
        try:
            loaded.set_result(load_engine_for(config, bundle))
        except BaseException as error:
            loaded.set_exception(error)

    thread = threading.Thread(target=load, name="load model", daemon=True)
    mark_abandonable(thread)
    thread.start()
    return loaded.result()


def _show(table: LiveTable, pipeline: Pipeline, label_names: tuple[str, ...], note: str) -> None:
    stats = pipeline.stats()
    addresses = {source.name: redact(source.url) for source in pipeline.sources()}
    counts = [source.frame_count for source in stats.sources]
    gone = sum(
        source.processed + sum(source.skipped.values()) + sum(source.dropped.values())
        for source in stats.sources
    )
    table.show(
        [_row(source, addresses.get(source.name, ""), label_names) for source in stats.sources],
        caption="\n".join(filter(None, (note, *_output_notes(stats)))),
        done=gone,
        total=None if None in counts or not counts else sum(count or 0 for count in counts),
    )


def _output_notes(stats: Stats) -> Iterator[str]:
    """Yield which outputs are not written, and how many frames are missing in them."""
    for name, problem in stats.outputs.items():
        if problem:
            yield f"{name}: not written: {problem}"
    missing = sum(sum(source.unrecorded.values()) for source in stats.sources)
    if missing:
        yield f"{missing} processed frames are missing in the files"


def _row(source: SourceStats, address: str, label_names: tuple[str, ...]) -> list[str]:
    if source.ended is not None or source.state is not SourceState.STREAMING:
        # The detail is "<address>: <problem>; <what to do>"; the log contains all of it.
        problem = source.detail.removeprefix(f"{address}: ").partition(";")[0]
        now = f"{source.state}: {problem}" if problem else source.state
    else:
        now = count_labels(source.last.labels.tolist() if source.last else [], label_names)
    return [
        source.name,
        str(source.captured),
        str(source.processed),
        str(sum(source.dropped.values())),
        f"{source.fps:.1f}",
        f"{source.latency_ms.p50:.0f}" if source.latency_ms else "",
        now,
    ]
