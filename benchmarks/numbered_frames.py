"""Check that header, image and instances of every message belong to the same frame.

    python -m benchmarks.numbered_frames --frames 100000

Every frame carries its source and its number as 32 bright or dark blocks that survive H.264. A
stand-in for the compiled graphs reads them from the network's input and writes them into boxes and
features, and from the features into masks and keypoints; everything else is the real pipeline:
decoding, drops, reconnects, batches, both modes of the engine, JPEG, ZeroMQ. Exits with 1 at a
mismatch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import openvino as ov
from msgspec.structs import replace
from numpy.typing import NDArray
from PIL import Image

import maskcast
from maskcast.engines.bundle import Bundle, FixedInput, open_bundle
from maskcast.engines.engine import Mode
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.engines.openvino import streams
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.pipeline.configuration.config import Config, ModelConfig, PublishConfig, SourceConfig
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.received import PublishedFrame
from maskcast.pipeline.subscriber.subscription import Subscription

HEIGHT, WIDTH, FPS = 192, 320, 50
_SERVER = Path(__file__).parents[1] / "tests" / "rtsp_server.py"
_DARK, _BRIGHT = 50, 200
_BITS = 28
"""4 of the source's id, 24 of the number; in an image a checksum of 4 bits follows."""


def draw_number(source: int, number: int) -> NDArray[np.uint8]:
    """Draw a frame ``[HEIGHT, WIDTH, 3]`` uint8 that carries its source and number."""
    value = source << 24 | number
    bits = _to_bits(value << 4 | _checksum(value), 32).reshape(4, 8)
    gray = np.where(bits, _BRIGHT, _DARK).astype(np.uint8)
    gray = np.kron(gray, np.ones((HEIGHT // 4, WIDTH // 8), np.uint8))
    return np.repeat(gray[:, :, None], 3, axis=2)


def read_number(rgb: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Read source and number from an image of any size; None if it has none."""
    rows, columns = rgb.shape[0] // 4, rgb.shape[1] // 8
    blocks = rgb[: rows * 4, : columns * 8, 1].reshape(4, rows, 8, columns)
    centres = blocks[:, rows // 4 : -(rows // 4), :, columns // 4 : -(columns // 4)]
    value = _from_bits(centres.mean((1, 3)) > (_DARK + _BRIGHT) / 2)
    if value & 15 != _checksum(value >> 4):
        return None
    return value >> 28, value >> 4 & 0xFFFFFF


def _checksum(value: int) -> int:
    return sum(value >> shift & 15 for shift in range(0, _BITS, 4)) % 16


def _to_bits(value: int, count: int) -> NDArray[np.bool_]:
    return np.array([value >> place & 1 for place in reversed(range(count))], np.bool_)


def _from_bits(bits: NDArray[np.bool_]) -> int:
    return int("".join("1" if bit else "0" for bit in bits.ravel()), 2)


class NumberStream:
    """Stands in for a stream's compiled graphs: its results encode the number in the image.

    Args:
        delay_s: a call takes up to this many seconds.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def detect(
        self, pixels: NDArray[np.uint8], content: tuple[int, int], features: ov.Tensor
    ) -> dict[str, NDArray[Any]]:
        """Write the number into features and boxes, of which there are 1 to 3."""
        time.sleep(random.random() * self._delay_s)
        found = read_number(pixels) or (0, 0xFFFFFF)
        source, number = found
        features.data[:] = _to_bits(source << 24 | number, _BITS)
        kept = np.arange(3)[None] < instance_count(number)
        return {
            "boxes": np.tile(box_of(source, number), (1, 3, 1)),
            "scores": np.where(kept, 0.9, 0).astype(np.float32),
            "labels": kept.astype(np.int64),
        }

    def segment(
        self, features: ov.Tensor, boxes: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Write the features' number into the first cells of the masks."""
        time.sleep(random.random() * self._delay_s)
        masks = np.zeros((len(boxes), 28, 28), np.float32)
        masks[:, 0, :_BITS] = features.data
        return masks

    def estimate_pose(
        self, features: ov.Tensor, boxes: NDArray[np.float32], k: int, blur_cells: float
    ) -> NDArray[np.float32]:
        """Write the features' number into the scores of the keypoints."""
        time.sleep(random.random() * self._delay_s)
        keypoints = np.zeros((len(boxes), k, 3), np.float32)
        keypoints[..., 2] = features.data
        return keypoints


def instance_count(number: int) -> int:
    """Return how many instances a frame has."""
    return 1 + number % 3


def box_of(source: int, number: int) -> NDArray[np.float32]:
    """Encode a number in a box ``[4]`` inside the image."""
    low, middle, high = number & 255, number >> 8 & 255, number >> 16
    return np.array([low / 2, middle / 2, 160 + high / 2, 144 + source], np.float32)


def load_number_engine(mode: Mode, delay_s: float) -> OpenVinoEngine:
    """Make the engine of a mode with ``NumberStream`` in place of its compiled graphs."""

    def compile_shape(*_: Any, streams: int, in_flight: int, **__: Any) -> Any:
        features = [ov.Tensor(ov.Type.f32, [1, _BITS]) for _ in range(in_flight)]
        numbered: list[Any] = [NumberStream(delay_s) for _ in range(streams)]
        return _streams.CompiledShape(numbered, features)

    bundle = open_bundle("default")
    graphs = bundle.manifest.graphs
    manifest = replace(
        bundle.manifest,
        input=FixedInput(HEIGHT, WIDTH),
        score_threshold=0.5,
        graphs=replace(graphs, poser=graphs.detector),
        keypoints=Keypoints(tuple(f"bit {place}" for place in range(_BITS))),
    )
    original, _streams.compile_shape = _streams.compile_shape, compile_shape
    try:
        return OpenVinoEngine(Bundle(bundle.path, manifest), mode, pose=True)
    finally:
        _streams.compile_shape = original


_streams: Any = streams


@dataclass
class Tally:
    """Counts of the checked frames, and their mismatches."""

    frames: int = 0
    restarts: int = 0
    skipped: int = 0
    mismatches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.frames} frames, {self.skipped} dropped by design, {self.restarts} reconnects, "
            f"{len(self.mismatches)} mismatches"
        )


class Checker:
    """Checks the messages of one run.

    Args:
        ids: the id that each source's frames carry, by the source's name.
        live: names of the sources whose numbers start again at a reconnect.
        tally: updated with the results.
    """

    def __init__(self, ids: dict[str, int], live: set[str], tally: Tally) -> None:
        self._ids, self._live, self._tally = ids, live, tally
        self._last: dict[str, tuple[int, PublishedFrame]] = {}

    def check(self, frame: PublishedFrame) -> None:
        """Compare the number in image and instances with each other and with the header."""
        self._tally.frames += 1
        assert frame.jpeg is not None
        image = read_number(np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB")))
        if image is None:
            self._wrong(frame, "the image carries no number")
            return
        source, number = image
        if source != self._ids[frame.source]:
            self._wrong(frame, f"the image is of source {source}")
        found = frame.instances
        if len(found) != instance_count(number):
            self._wrong(frame, f"{len(found)} instances with image {number}")
        if not (found.boxes == box_of(source, number)).all():
            self._wrong(frame, f"boxes {found.boxes.tolist()} with image {number}")
        bits = _to_bits(source << 24 | number, _BITS)
        if not ((np.asarray(found.masks)[:, 0, :_BITS] > 127) == bits).all():
            self._wrong(frame, f"masks of another frame with image {number}")
        if not (np.asarray(found.keypoints)[..., 2] == bits).all():
            self._wrong(frame, f"keypoints of another frame with image {number}")
        self._check_header(frame, number)

    def _check_header(self, frame: PublishedFrame, number: int) -> None:
        last = self._last.get(frame.source)
        self._last[frame.source] = number, frame
        if frame.source not in self._live:
            self._tally.skipped += frame.index - (last[1].index + 1 if last else 0)
            if frame.index != number:
                self._wrong(frame, f"the image is {number}")
            if frame.pts_s is None or abs(frame.pts_s - number / FPS) > 0.5 / FPS:
                self._wrong(frame, f"pts {frame.pts_s} with image {number}")
            return
        if last is None:
            return
        steps = frame.index - last[1].index
        if number <= last[0]:
            self._tally.restarts += 1
            return
        self._tally.skipped += steps - 1
        if steps != number - last[0]:
            self._wrong(frame, f"{steps} frames after image {last[0]}, and the image is {number}")
        elif frame.pts_s is None or last[1].pts_s is None:
            self._wrong(frame, "no pts")
        elif frame.pts_s <= last[1].pts_s:
            self._wrong(frame, f"pts {frame.pts_s} after {last[1].pts_s}")
        # The first timestamps of a connection may repeat; they are replaced by arrival times.
        elif last[0] > 10 and abs(frame.pts_s - last[1].pts_s - steps / FPS) > 0.5 / FPS:
            self._wrong(frame, f"pts {frame.pts_s} {steps} frames after {last[1].pts_s}")

    def _wrong(self, frame: PublishedFrame, what: str) -> None:
        self._tally.mismatches.append(f"{frame.source} index {frame.index}: {what}")


def make_clip(path: Path, source: int, frames: int) -> Path:
    """Encode numbered frames as H.264 with B-frames, so that packets are not in order."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            decoded = av.VideoFrame.from_ndarray(draw_number(source, number), "rgb24")
            container.mux(stream.encode(decoded))
        container.mux(stream.encode(None))
    return path


@contextlib.contextmanager
def rtsp_camera(source: int, frames: int) -> Iterator[str]:
    """Serve numbered frames over RTSP; after ``frames`` the stream ends and starts again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["/usr/bin/python3", str(_SERVER), "--port", str(port), "--numbered", str(source)]
    command += ["--width", str(WIDTH), "--height", str(HEIGHT), "--fps", str(FPS)]
    process = subprocess.Popen(
        [*command, "--frames", str(frames)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise FileNotFoundError("the RTSP server does not start")
        yield f"rtsp://127.0.0.1:{port}/cam"
    finally:
        process.kill()
        process.communicate()


def run(
    sources: Sequence[SourceConfig],
    ids: dict[str, int],
    mode: Mode,
    tally: Tally,
    *,
    limit: int | None = None,
    delay_s: float = 0.002,
) -> None:
    """Run a pipeline and check every message of it.

    Args:
        sources: named; the names of cameras begin with "cam".
        ids: the id that each source's frames carry.
        mode: mode of the engine.
        tally: updated with the results.
        limit: maximum number of frames of each source.
        delay_s: a call of the engine takes up to this many seconds.
    """
    engine = load_number_engine(mode, delay_s)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/frames"
        config = Config(
            sources=tuple(sources),
            model=ModelConfig(mode=mode),
            publish=PublishConfig(
                endpoint=endpoint,
                jpeg_quality=90,
                high_water_mark=100_000,
                wait_subscribers=1,
            ),
        )
        live = {name for name in ids if name.startswith("cam")}
        checker = Checker(ids, live, tally)
        subscription: Subscription = maskcast.subscribe(
            endpoint, policy="all", events=True, high_water_mark=100_000
        )
        pipeline = Pipeline(config, engine, limit=limit)
        ended: Counter[str] = Counter()
        with subscription:
            pipeline.start()
            try:
                while len(ended) < len(sources):
                    item = subscription.receive(timeout_s=60)
                    if isinstance(item, PublishedFrame):
                        checker.check(item)
                        if item.lost_before:
                            tally.mismatches.append(f"{item.source}: {item.lost_before} lost")
                    elif item.name == "ended":
                        ended[item.source] += 1
            finally:
                pipeline.stop()
                pipeline.join()
    engine.close()


def _rounds(folder: Path, clip_frames: int) -> Iterator[tuple[list[SourceConfig], dict[str, int]]]:
    """Yield the sources and their ids for each run."""
    clips = [make_clip(folder / f"{n}.mp4", n, clip_frames) for n in (1, 2, 3)]
    with rtsp_camera(4, 500) as first, rtsp_camera(5, 333) as second:
        while True:
            yield [SourceConfig(url=str(clips[0]), name="film")], {"film": 1}
            yield (
                [
                    SourceConfig(url=str(clips[0]), name="film"),
                    SourceConfig(url=str(clips[1]), name="third", every_nth=3),
                    SourceConfig(url=str(clips[2]), name="latest", policy="latest"),
                ],
                {"film": 1, "third": 2, "latest": 3},
            )
            yield (
                [
                    SourceConfig(url=first, name="cam-a"),
                    SourceConfig(url=second, name="cam-b", max_fps=30.0),
                    SourceConfig(url=str(clips[1]), name="film"),
                ],
                {"cam-a": 4, "cam-b": 5, "film": 2},
            )


def main() -> int:
    """Run until enough frames have been checked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=10_000, help="number of frames to check")
    parser.add_argument("--clip", type=int, default=2_000, help="frames of a clip")
    options = parser.parse_args()
    tally, begin = Tally(), time.monotonic()
    modes: tuple[Mode, Mode] = ("throughput", "latency")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        rounds = _rounds(Path(folder), options.clip)
        stack.callback(rounds.close)  # type: ignore[attr-defined]
        for number, (sources, ids) in enumerate(rounds):
            # A slow engine makes live sources drop frames.
            delay_s = 0.03 if number % 4 == 3 else 0.002
            run(sources, ids, modes[number % 2], tally, limit=options.clip, delay_s=delay_s)
            print(f"{time.monotonic() - begin:.0f} s: {tally}", flush=True)
            for mismatch in tally.mismatches[:10]:
                print(mismatch, flush=True)
            if tally.mismatches:
                return 1
            if tally.frames >= options.frames:
                return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
