"""Measure how close the whole pipeline comes to the speed of its engine, on a file.

Run: ``python -m benchmarks.pipeline CLIP [--bundle FOLDER] [--limit N] [--repeat N] [--json]``.
Each repeat times the bare engine, the pipeline with one subscriber, and the bare engine again on
the same frames; medians over the repeats are reported. Without a clip it makes one: 1280 x 720,
H.264, moving gradients, in which the model finds little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import av

from maskcast.engines.load import load_engine
from maskcast.pipeline.cli.profile.profile import Report, profile
from maskcast.pipeline.sources.pattern import draw_pattern


def make_clip(path: Path, frames: int, width: int = 1280, height: int = 720) -> None:
    """Encode the test pattern as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            decoded = av.VideoFrame.from_ndarray(draw_pattern(width, height, index), "rgb24")
            container.mux(stream.encode(decoded))
        container.mux(stream.encode(None))


def summarise(reports: list[Report]) -> dict[str, float | list[float]]:
    """Take medians over the repeats."""
    shares = [report.fps / report.engine_fps for report in reports]
    return {
        "fps": statistics.median(report.fps for report in reports),
        "engine_fps": statistics.median(report.engine_fps for report in reports),
        "share": statistics.median(shares),
        "shares": shares,
        "latency_p50_ms": statistics.median(report.latency_ms.p50 for report in reports),
        "infer_busy": statistics.median(report.stages["infer"].busy for report in reports),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", nargs="?", type=Path)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    engine = load_engine(arguments.bundle)
    with tempfile.TemporaryDirectory() as folder:
        clip = arguments.clip or Path(folder) / "pattern.mp4"
        if arguments.clip is None:
            make_clip(clip, arguments.limit)
        reports = [profile(str(clip), engine, arguments.limit) for _ in range(arguments.repeat)]
    engine.close()
    summary = {"device": engine.device, "frames": reports[0].frames, **summarise(reports)}
    if arguments.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
