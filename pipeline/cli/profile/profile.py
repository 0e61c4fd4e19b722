"""Profile: the time of each stage, and the pipeline's speed compared with the bare engine's."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import Progress

from maskcast.engines.engine import Engine, Mode
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage
from maskcast.engines.load import load_engine
from maskcast.engines.memory import read_memory
from maskcast.pipeline.cli.profile.alone import Alone, measure_file, measure_images
from maskcast.pipeline.cli.profile.decoding import measure_decoding
from maskcast.pipeline.cli.profile.report import Report, make_report, report_table
from maskcast.pipeline.cli.signals import stopping_on_signals
from maskcast.pipeline.configuration.config import Config, ModelConfig, PublishConfig, SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.log import fields
from maskcast.pipeline.monitor.trace import Trace, write_trace
from maskcast.pipeline.outputs.files import PendingFile, check_not_input, check_writable
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.ffmpeg import decode_device
from maskcast.pipeline.sources.files import is_fifo
from maskcast.pipeline.sources.open import check_source, create_source
from maskcast.pipeline.sources.source import SourceLostError
from maskcast.pipeline.sources.state import SourceState, StateChange
from maskcast.pipeline.stages.infer import mode_for
from maskcast.pipeline.stats import Stats
from maskcast.pipeline.url import is_local, local_path, source_name

ENGINE_FRAMES = 128
"""The engine alone is measured on at most this many frames before the run, and on as many others
after it, spread evenly over the source."""

ENDLESS_LIMIT = 300
"""Number of frames of a source without an end, if no limit is given."""

PROGRESS_EVERY_S = 0.25

OnProgress = Callable[[int, int | None], None]

LIVE_SAMPLE = 16
"""Number of frames of a live source that the bare engine is timed on repeatedly."""

_LAST_MESSAGES_S = 10.0
"""Maximum wait after the run for the subscriber to receive the last messages, seconds."""

_logger = logging.getLogger(__name__)


class ProfileInterrupted(Exception):  # noqa: N818 - a request of the user, not an error
    """The profile was stopped before there was anything to report."""


@dataclass(frozen=True, slots=True)
class _Extent:
    """What is known about a source before the run.

    Attributes:
        count: number of frames that will be run; None if the source does not know its length.
        limit: maximum number of frames to run; None if the source ends by itself.
        stride: the parts are measured alone on every ``stride``-th frame.
        paced: whether frames arrive at the source's own pace.
        images: the frames of a live source that the bare engine is timed on; None for other
            sources, which are read again.
    """

    count: int | None
    limit: int | None
    stride: int
    paced: bool
    images: list[NetworkImage] | None


def profile(
    source: str | SourceConfig,
    bundle: str | Path | Engine = "default",
    limit: int | None = None,
    *,
    engine: str = "auto",
    mode: Mode | Literal["auto"] = "auto",
    pose: bool = False,
    min_score: float | None = None,
    trace: Trace | None = None,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Run a source through the pipeline, with a subscriber, and its parts alone.

    The parts are measured once before and once after the pipeline, so that a drift in the machine's
    speed affects both. Nothing is measured before the engine is warmed up. A live source is opened
    twice: for the bare engine's frames, and for the pipeline.

    Args:
        source: a URL as in ``SourceConfig.url``, or the source's whole configuration.
        bundle: a bundle's name or folder, or an engine, which is left open.
        limit: maximum number of frames to run; None for all of a file, and for ``ENDLESS_LIMIT`` of
            a source without an end.
        engine: as in ``load_engine``.
        mode: as in ``ModelConfig.mode``.
        pose: as in ``load_engine``.
        min_score: instances below it are left out; the bundle's own threshold by default.
        trace: keeps the frames' timelines.
        on_progress: called a few times a second with the number of frames done and the total, the
            engine's rounds included; the total is None if the source does not know its length.
        stop: when set, the pipeline ends early, and the report covers the frames so far.

    Raises:
        InputError: the source or the bundle cannot be opened.
        ProfileInterrupted: ``stop`` was set before a frame was processed.
    """
    config = source if isinstance(source, SourceConfig) else SourceConfig(url=source)
    check_source(config)
    stop = stop or threading.Event()
    if isinstance(bundle, Engine):
        runner = bundle
    else:
        chosen = mode_for(Config(sources=(config,), model=ModelConfig(mode=mode)))
        runner = load_engine(bundle, engine, chosen, pose=pose)
    try:
        threshold = runner.manifest.score_threshold if min_score is None else min_score
        extent = _extent(config, runner, limit, stop)
        device = decode_device(config, runner.decode_device)
        decoded = msgspec.structs.replace(config, decode=device or "software")
        count = extent.count
        rounds = 0 if count is None else min(2 * ENGINE_FRAMES, -(-count // extent.stride))
        total = None if count is None else count + rounds

        def progress(done: int) -> None:
            if on_progress is not None:
                on_progress(done, total)

        def measure_alone(offset: int, done: int) -> Alone:
            return _measure_alone(
                decoded, extent, offset, runner, threshold, stop, lambda more: progress(done + more)
            )

        alone = measure_alone(0, 0)
        if stop.is_set():
            raise ProfileInterrupted
        done = alone.frames
        stats, spent_s = run_pipeline(
            [config], runner, threshold, extent.limit, trace, stop, lambda n: progress(done + n)
        )
        if not stats.processed and stop.is_set():
            raise ProfileInterrupted
        alone += measure_alone(1, done + stats.processed)
        is_file = extent.images is None and extent.count is not None and not config.loop
        decoding = measure_decoding(
            config, stats.sources[0].decoder, extent.count if is_file else None, stop
        )
    finally:
        if runner is not bundle:
            runner.close()
    # A paced source may lose frames, and one without a length was not decoded to its end.
    is_comparable = not extent.paced and extent.count is not None and not stop.is_set()
    return make_report(
        stats,
        alone,
        read_memory(),
        decoding,
        paced=extent.paced,
        processor_s=spent_s if is_comparable else None,
    )


def show_profile(
    source: str,
    model: str | None,
    limit: int | None,
    mode: Mode | Literal["auto"],
    pose: bool,
    json: Path | None,
    trace: Path | None,
) -> None:
    """Profile a source until its end, SIGINT or SIGTERM; print the report and write the files.

    A signal after the first frames ends the run early; the report is still printed and written.

    Raises:
        InputError: the source, the model or a file's name is wrong; nothing is written.
        SystemExit: with exit code 130, if a signal arrives before there is anything to report.
    """
    inputs = [local_path(source)] if is_local(source) else []
    if any(is_fifo(path) for path in inputs):
        raise InputError(f"{source}: a pipe can be read only once; profile a file")
    for path in filter(None, (json, trace)):
        check_writable(path)
        check_not_input(path, inputs)
    if json is not None and trace is not None and json.resolve() == trace.resolve():
        raise InputError(f"{json}: two outputs have this name; choose another for one of them")
    seen = Trace() if trace is not None else None
    console = Console(stderr=True)
    with (
        stopping_on_signals() as stop,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("profiling", total=None)

        def show(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        try:
            report = profile(
                source,
                model or "default",
                limit,
                mode=mode,
                pose=pose,
                trace=seen,
                on_progress=show,
                stop=stop,
            )
        except ProfileInterrupted:
            console.print("interrupted before a frame was measured")
            sys.exit(130)
        interrupted = stop.is_set()
    if trace is not None and seen is not None:
        _write(trace, lambda path: write_trace(path, seen.passages))
    if json is not None:
        encoded = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
        _write(json, lambda path: path.write_bytes(encoded))
    out = Console(stderr=json is not None)
    out.print(report_table(report, width=out.width))
    if interrupted:
        out.print(f"interrupted: these are the figures of the first {report.frames} frames")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, so that an existing one stays complete until it is done.

    Raises:
        InputError: it cannot be written.
    """
    pending = PendingFile(path, replace=True)
    try:
        write(pending.path)
        pending.keep()
    except OSError as error:
        pending.discard()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _extent(
    config: SourceConfig, engine: Engine, limit: int | None, stop: threading.Event
) -> _Extent:
    """Open the source to find out what it is. Wait for a camera that is unreachable, and log it.

    Raises:
        InputError: the source cannot be opened.
        ProfileInterrupted: ``stop`` was set before it was open.
    """

    def log(change: StateChange) -> None:
        if change.state is SourceState.RECONNECTING:
            shown = fields(source=source_name(config.url), reason=change.reason)
            _logger.warning("source_unreachable", extra=shown)

    images = None
    try:
        with create_source(config, log, stop) as opened:
            count = opened.frame_count
            endless = opened.live or config.loop
            paced = opened.policy == "latest"
            if opened.live:
                sample = islice(opened, min(LIVE_SAMPLE, limit or LIVE_SAMPLE))
                images = list(_images(sample, engine))
    except (InputError, SourceLostError):
        if stop.is_set():
            raise ProfileInterrupted from None
        raise
    if limit is None and endless:
        limit = ENDLESS_LIMIT
    count = min((number for number in (count, limit) if number is not None), default=None)
    stride = 1 if endless or count is None else -(-count // (2 * ENGINE_FRAMES))
    return _Extent(count, limit, stride, paced, images)


def _images(frames: Iterable[Frame], engine: Engine) -> Iterator[NetworkImage]:
    return (engine.fit(frame.decoded, frame.rotation) for frame in frames)


def _measure_alone(
    config: SourceConfig,
    extent: _Extent,
    offset: int,
    engine: Engine,
    min_score: float,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> Alone:
    """Measure the parts on every other frame of the sample, from ``offset``, 0 or 1."""
    if extent.images is not None:
        again = islice(cycle(extent.images), min(ENGINE_FRAMES, extent.limit or ENGINE_FRAMES))
        return measure_images(again, engine, min_score, stop, progress)
    count = extent.count
    if count is None:
        with create_source(config) as source:
            images = _images(islice(source, ENGINE_FRAMES), engine)
            return measure_images(images, engine, min_score, stop, progress)
    indices = slice(offset * extent.stride, count, 2 * extent.stride)
    return measure_file(config, engine, min_score, indices, stop, progress)


def run_pipeline(
    sources: Sequence[SourceConfig],
    engine: Engine,
    min_score: float,
    limit: int | None,
    trace: Trace | None,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> tuple[Stats, float]:
    """Run the pipeline with a subscriber in another process: without one, nothing is encoded.

    Returns:
        The pipeline's figures, and the processor time that it took, seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/profile"
        pipeline = Pipeline(
            Config(
                sources=tuple(sources),
                model=ModelConfig(score_threshold=min_score),
                publish=PublishConfig(endpoint=endpoint, wait_subscribers=1),
            ),
            engine,
            limit=limit,
            witness=trace,
        )
        with _listener(endpoint) as listener:
            began_s, own_s = time.process_time(), time.thread_time()
            pipeline.start()
            try:
                while not pipeline.wait(PROGRESS_EVERY_S) and not stop.is_set():
                    progress(pipeline.stats().processed)
                    if listener.poll():
                        raise RuntimeError(f"the subscriber failed: exit code {listener.poll()}")
            finally:
                pipeline.stop()
                pipeline.join()
            own_s = time.thread_time() - own_s  # spent on the progress bar, not by the pipeline
            spent_s = time.process_time() - began_s - own_s
    return pipeline.stats(), spent_s


@contextmanager
def _listener(endpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a subscriber in a process of its own; Ctrl-C does not reach it."""
    command = [sys.executable, "-m", "maskcast.pipeline.cli.profile.listen", endpoint]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdin is not None
    try:
        yield process
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_MESSAGES_S)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
