"""Alone: times decoding, resizing, the engine and encoding without a pipeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby, islice
from typing import Self

from maskcast.engines.engine import Engine
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.wire.message import InstancesHeader, InstancesMessage, array_names, encode


@dataclass(slots=True)
class Alone:
    """The times of a pipeline's parts when each runs alone, summed over the measured frames.

    Attributes:
        frames: number of frames that were resized, processed by the engine, and encoded.
        engine_wall_s: seconds that the engine took.
        resize_s, engine_s, encode_s: processor time, all cores together, seconds.
        decoded: number of frames that were decoded.
        decode_s: processor time of decoding them, seconds.
    """

    frames: int = 0
    engine_wall_s: float = 0.0
    resize_s: float = 0.0
    engine_s: float = 0.0
    encode_s: float = 0.0
    decoded: int = 0
    decode_s: float = 0.0

    def __add__(self, other: Self) -> Alone:
        """Return the sum of two measurements."""
        return Alone(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Alone)))


def measure_file(
    config: SourceConfig,
    engine: Engine,
    min_score: float,
    indices: slice,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> Alone:
    """Decode all frames of a file; resize, detect and encode some of them, one thread for all.

    The parts take turns, a batch of the engine at a time, as in a pipeline. With several frames in
    a row, the processor's caches would be warm: resizing would take half the time, and encoding a
    quarter.

    Args:
        config: the file.
        engine: runs the model.
        min_score: instances below it are left out.
        indices: indices of the frames to resize and to run the engine on; its ``stop`` is the
            number of frames to decode.
        stop: ends the measurement early.
        progress: called with the number of frames that the engine has done.
    """
    alone = Alone()
    began_s = time.process_time()
    with create_source(config) as source:
        alone.decoded = sum(1 for _ in islice(source, indices.stop))
    alone.decode_s = time.process_time() - began_s

    warm = _Warm(engine, min_score)
    began_s = time.process_time()
    with create_source(config) as source:
        frames = islice(source, indices.start, indices.stop, indices.step)
        while not stop.is_set() and (chunk := list(islice(frames, engine.max_batch))):
            resize_s = time.thread_time()
            images = [engine.fit(frame.decoded, frame.rotation) for frame in chunk]
            alone.resize_s += time.thread_time() - resize_s
            warm.run(images)
            spent_s, found = _run_engine(engine, images, min_score)
            alone.engine_wall_s += spent_s
            encode_s = time.thread_time()
            for instances in found:
                encode_alone(instances, engine.manifest.keypoints)
            alone.encode_s += time.thread_time() - encode_s
            alone.frames += len(chunk)
            progress(alone.frames)
    # Decoder threads run during the other parts, so the engine's time is what the sum leaves.
    all_s = time.process_time() - began_s - warm.spent_s
    alone.engine_s = all_s - alone.decode_s - alone.resize_s - alone.encode_s
    return alone


def measure_images(
    images: Iterator[NetworkImage],
    engine: Engine,
    min_score: float,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> Alone:
    """Time the engine on images."""
    alone, warm = Alone(), _Warm(engine, min_score)
    while not stop.is_set() and (chunk := list(islice(images, engine.max_batch))):
        warm.run(chunk)
        alone.engine_wall_s += _run_engine(engine, chunk, min_score)[0]
        alone.frames += len(chunk)
        progress(alone.frames)
    return alone


def encode_alone(instances: Instances, keypoints: Keypoints | None) -> list[bytes]:
    """Encode the message of a frame, with the default mask format."""
    header = InstancesHeader(
        publisher="0" * 16,
        seq=0,
        index=0,
        capture_ns=0,
        publish_ns=0,
        width=instances.width,
        height=instances.height,
        count=len(instances),
        masks="none" if instances.masks is None else "crop_u8",
        arrays=array_names(instances),
        keypoints=None if instances.keypoints is None else keypoints,
    )
    return encode(InstancesMessage("source", header, instances, None))


class _Warm:
    """Runs the engine once on each new image shape, so that warm-up is not timed."""

    def __init__(self, engine: Engine, min_score: float) -> None:
        self.spent_s = 0.0
        self._engine = engine
        self._min_score = min_score
        self._shapes: set[tuple[int, ...]] = set()

    def run(self, images: list[NetworkImage]) -> None:
        began_s = time.process_time()
        for image in images:
            if image.shape not in self._shapes:
                self._shapes.add(image.shape)
                _run_engine(self._engine, [image], self._min_score)
        self.spent_s += time.process_time() - began_s


def _run_engine(
    engine: Engine, images: list[NetworkImage], min_score: float
) -> tuple[float, list[Instances]]:
    """Run the engine on images in batches of one shape; return the seconds and the instances."""
    found: list[Instances] = []
    began_s = time.perf_counter()
    for _, alike in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(alike, engine.max_batch)):
            found += engine.run(batch, min_score)
    return time.perf_counter() - began_s, found
