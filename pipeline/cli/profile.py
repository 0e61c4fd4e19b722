"""Profile: where a pipeline's time goes, and how near it comes to its engine's own speed."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from maskcast.engines.engine import Engine, Mode
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.load import load_engine
from maskcast.pipeline.cli.report import Report, make_report
from maskcast.pipeline.config import Config, ModelConfig, PublishConfig, SourceConfig
from maskcast.pipeline.memory import read_memory
from maskcast.pipeline.monitor.trace import Trace
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.stages.infer import mode_for
from maskcast.pipeline.stats import Stats
from maskcast.pipeline.wire.subscriber import subscribe

ENGINE_FRAMES = 64
"""The bare engine is timed on so many of the frames, evenly spread."""

ENDLESS_LIMIT = 300
"""Frames taken from a source without an end when no limit is given."""

PROGRESS_EVERY_S = 0.25

OnProgress = Callable[[int, int | None], None]

_CHUNK_FRAMES = 8
_SUBSCRIBER_TIMEOUT_S = 3600.0


def profile(
    source: str | SourceConfig,
    bundle: str | Path | Engine = "default",
    limit: int | None = None,
    *,
    engine: str = "auto",
    mode: Mode | Literal["auto"] = "auto",
    min_score: float | None = None,
    trace: Trace | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Run a source through the pipeline, with a subscriber, and through the bare engine.

    The engine is timed once before and once after the pipeline, so that a machine whose speed
    drifts is fair to both. Nothing is measured before the engine is warm.

    Args:
        source: an address as in ``SourceConfig.url``, or the whole configuration.
        bundle: what runs; an engine that is given is left open.
        limit: the most frames to run; all of a file, ``ENDLESS_LIMIT`` of a source without an end.
        engine: as in ``load_engine``.
        mode: as in ``ModelConfig.mode``.
        min_score: instances below it are left out; the bundle's own threshold by default.
        trace: keeps the frames' timelines.
        on_progress: told, a few times a second, how many frames are done of how many in all, the
            engine's rounds included; the latter is None where the source does not tell its length.

    Raises:
        InputError: the source or the bundle cannot be opened.
    """
    config = source if isinstance(source, SourceConfig) else SourceConfig(url=source)
    if isinstance(bundle, Engine):
        runner = bundle
    else:
        chosen = mode_for(Config(sources=(config,), model=ModelConfig(mode=mode)))
        runner = load_engine(bundle, engine, chosen)
    try:
        threshold = runner.manifest.score_threshold if min_score is None else min_score
        count, limit, stride, paced = _extent(config, limit)
        total = None if count is None else count + 2 * min(ENGINE_FRAMES, -(-count // stride))

        def progress(done: int) -> None:
            if on_progress is not None:
                on_progress(done, total)

        frames, before_s = _time_engine(config, runner, threshold, limit, stride, progress)
        stats = _run_pipeline(
            config, runner, threshold, limit, trace, lambda done: progress(frames + done)
        )
        frames_again, after_s = _time_engine(
            config,
            runner,
            threshold,
            limit,
            stride,
            lambda done: progress(frames + stats.processed + done),
        )
    finally:
        if runner is not bundle:
            runner.close()
    engine_fps = (frames + frames_again) / (before_s + after_s)
    return make_report(stats, engine_fps, read_memory(), paced=paced)


def _extent(config: SourceConfig, limit: int | None) -> tuple[int | None, int | None, int, bool]:
    """Return the number of frames, the limit, the stride of the engine's frames, and the pace.

    That is whether frames come at their own. The first is None where the source does not tell, the
    second where it ends by itself.
    """
    with create_source(config) as opened:
        count = opened.frame_count
        endless = opened.live or config.loop
        paced = opened.policy == "latest"
    if limit is None and endless:
        limit = ENDLESS_LIMIT
    count = min((number for number in (count, limit) if number is not None), default=None)
    if endless or count is None:
        return count, limit, 1, paced
    return count, limit, max(1, count // ENGINE_FRAMES), paced


def _time_engine(
    config: SourceConfig,
    engine: Engine,
    min_score: float,
    limit: int | None,
    stride: int,
    progress: Callable[[int], None],
) -> tuple[int, float]:
    """Return how many frames the bare engine did and how many seconds they took it.

    A few pictures at a time are made ready first: nothing is decoded while the engine is timed, and
    memory stays bounded.
    """
    frames, spent_s, warm = 0, 0.0, set[tuple[int, ...]]()
    with create_source(config) as source:
        images = (
            fit_image(frame.picture, frame.rotation, engine.manifest.input)
            for frame in islice(source, 0, limit, stride)
        )
        while chunk := list(islice(images, min(_CHUNK_FRAMES, ENGINE_FRAMES - frames))):
            for image in chunk:
                if image.pixels.shape not in warm:
                    warm.add(image.pixels.shape)
                    _run_engine(engine, [image], min_score)
            spent_s += _run_engine(engine, chunk, min_score)
            frames += len(chunk)
            progress(frames)
    return frames, spent_s


def _run_engine(engine: Engine, images: list[NetworkImage], min_score: float) -> float:
    """Time the engine on pictures, as many of one shape at once as it takes."""
    began_s = time.perf_counter()
    for _, alike in groupby(images, key=lambda image: image.pixels.shape):
        while batch := list(islice(alike, engine.max_batch)):
            engine.segment(engine.detect(batch, min_score))
    return time.perf_counter() - began_s


def _run_pipeline(
    config: SourceConfig,
    engine: Engine,
    min_score: float,
    limit: int | None,
    trace: Trace | None,
    progress: Callable[[int], None],
) -> Stats:
    """Run the pipeline with a subscriber beside it: nothing is encoded where nobody listens."""
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/profile"
        pipeline = Pipeline(
            Config(
                sources=(config,),
                model=ModelConfig(score_threshold=min_score),
                publish=PublishConfig(endpoint=endpoint, wait_subscribers=1),
            ),
            engine,
            limit=limit,
            witness=trace,
        )
        with subscribe(endpoint, policy="all", timeout_s=_SUBSCRIBER_TIMEOUT_S) as subscription:
            listener = threading.Thread(
                target=lambda: deque(subscription, maxlen=0), name="profile subscriber", daemon=True
            )
            listener.start()
            pipeline.start()
            try:
                while not pipeline.wait(PROGRESS_EVERY_S):
                    progress(pipeline.stats().processed)
            finally:
                pipeline.stop()
                pipeline.join()
        listener.join()
    return pipeline.stats()
