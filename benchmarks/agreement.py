"""Compare the answers of fresh engines with a reference, under load.

    python -m benchmarks.agreement --engines 100 --hogs 2 --nice 10 --perturb

Loads engines one after the other, a few in each child process; each compiles its graphs, or with
``--cached`` loads those that the first ones compiled. Compares every image of every batch with the
answers of one engine in latency mode. Prints how many engines were loaded, how many images
answered, how often an engine rejected its own graphs and compiled them again, how many answers
differ, and how many children were killed by a signal, such as an abort in a library. Exits with 1
at the first child that found a difference, or at the end if a child was killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from benchmarks.busy import busy_processes
from maskcast.engines.bundle import Bundle, FixedInput, open_bundle
from maskcast.engines.engine import Engine, Mode
from maskcast.engines.image import NetworkImage, fit_image
from maskcast.engines.instances.instances import Instances
from maskcast.engines.load import load_engine

_ENGINES_OF_A_CHILD = 10
_DEFAULT_SHAPE_EVERY = 10
"""One engine of this many uses the bundle's own input shape, which takes longer."""
_SMALL = FixedInput(128, 224)
_COUNTS = ("engines", "answers", "instances", "rejected", "differences")
_TOLERANCES = {"boxes": 0.1, "scores": 1e-3, "labels": 0, "masks": 2}
"""Pixels, probability, class, probability x 255."""


def main() -> int:
    """Start the child processes, or run as one of them."""
    options = _options()
    if options.child is not None:
        print(json.dumps(_run_engines(options)), flush=True)
        return 0
    bundle = open_bundle(options.bundle)
    os.nice(options.nice)
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    total = dict.fromkeys((*_COUNTS, "aborts"), 0)
    begin = time.monotonic()
    with busy_processes(options.hogs), tempfile.TemporaryDirectory() as folder:
        for name, small in (("small", True), ("own", False)):
            _write_reference(bundle, small, Path(folder) / f"{name}.npz")
        for first in range(0, options.engines, _ENGINES_OF_A_CHILD):
            count = min(_ENGINES_OF_A_CHILD, options.engines - first)
            for key, value in _child(options, folder, first, count).items():
                total[key] += value
            print(f"{time.monotonic() - begin:.0f} s: {_summary(total)}", flush=True)
            if total["differences"]:
                return 1
    return 1 if total["aborts"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=100, help="number of engines to load")
    parser.add_argument("--bundle", default="default", help="name or folder")
    parser.add_argument(
        "--hogs", type=int, default=0, help="busy processes that compete with the engines"
    )
    parser.add_argument("--nice", type=int, default=0, help="niceness of engines and hogs")
    parser.add_argument("--one-core", action="store_true", help="run everything on one core")
    parser.add_argument(
        "--perturb", action="store_true", help="fill freed memory (MALLOC_PERTURB_)"
    )
    parser.add_argument("--cached", action="store_true", help="load graphs from a cache")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _summary(total: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in total.items())


def _child(options: argparse.Namespace, folder: str, first: int, count: int) -> dict[str, int]:
    cache = folder if options.cached else os.devnull  # where nothing can be stored
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "XDG_CACHE_HOME": cache}
    if options.perturb:
        environment["MALLOC_PERTURB_"] = str(random.randint(1, 255))
    command = [sys.executable, "-m", "benchmarks.agreement", "--child", folder]
    command += ["--first", str(first), "--engines", str(count), "--bundle", options.bundle]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        print(f"engines {first} to {first + count - 1}: ended by {name}", file=sys.stderr)
        return {"aborts": 1}
    done.check_returncode()
    found: dict[str, int] = json.loads(done.stdout)
    return found


class _Rejections(logging.Handler):
    """Counts how often an engine rejected its own graphs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage() in ("streams_disagree", "stored_graphs_disagree")


def _run_engines(options: argparse.Namespace) -> dict[str, int]:
    bundle = open_bundle(options.bundle)
    rejections = _Rejections()
    logging.getLogger("maskcast").addHandler(rejections)
    total = dict.fromkeys(_COUNTS, 0)
    modes: tuple[Mode, ...] = get_args(Mode)
    for number in range(options.first, options.first + options.engines):
        is_small = number % _DEFAULT_SHAPE_EVERY != 0
        reference = np.load(Path(options.child) / ("small.npz" if is_small else "own.npz"))
        # Throughput mode has been wrong before: try it three times as often.
        mode = modes[0] if number % 4 == 1 else modes[1]
        engine = load_engine(_with_input(bundle, is_small), "openvino", mode)
        for _ in range(2):
            images = _images(engine, 2 * engine.max_batch)
            for first in range(0, len(images), engine.max_batch):
                batch = images[first : first + engine.max_batch]
                for index, found in enumerate(engine.segment(engine.detect(batch, 0.0)), first):
                    total["answers"] += 1
                    total["instances"] += len(found)
                    if difference := _difference(found, reference, index):
                        total["differences"] += 1
                        print(f"engine {number}, {mode}: {difference}", file=sys.stderr, flush=True)
        engine.close()
        total["engines"] += 1
    total["rejected"] = rejections.count
    return total


def _with_input(bundle: Bundle, is_small: bool) -> Bundle:
    shape = _SMALL if is_small else bundle.manifest.input
    return Bundle(bundle.path, replace(bundle.manifest, input=shape))


def _write_reference(bundle: Bundle, is_small: bool, path: Path) -> None:
    engine = load_engine(_with_input(bundle, is_small), "openvino", "latency")
    arrays = {}
    count = 4 * max(len(os.sched_getaffinity(0)), 1)
    for index, image in enumerate(_images(engine, count)):
        (found,) = engine.segment(engine.detect([image], 0.0))
        arrays |= {f"{name}{index}": getattr(found, name) for name in _TOLERANCES}
    if not sum(len(array) for name, array in arrays.items() if name.startswith("boxes")):
        raise SystemExit("the model finds nothing in the images: there is nothing to compare")
    engine.close()
    np.savez(path, **arrays)


def _difference(found: Instances, reference: Any, index: int) -> str | None:
    for name, tolerance in _TOLERANCES.items():
        expected, got = reference[f"{name}{index}"], getattr(found, name)
        if expected.shape != got.shape:
            return f"image {index}: {len(got)} instances instead of {len(expected)}"
        largest = np.abs(expected.astype(float) - got).max(initial=0)
        if not largest <= tolerance:
            return f"image {index}: {name} differ by {largest:g}"
    return None


def _images(engine: Engine, count: int) -> list[NetworkImage]:
    """Draw images of upright ellipses on noise, each with another seed."""
    images = []
    for seed in range(count):
        frame = av.VideoFrame.from_ndarray(_draw(seed), format="rgb24")
        images.append(fit_image(frame, 0, engine.manifest.input))
    return images


def _draw(seed: int, height: int = 270, width: int = 480) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    rgb = random.integers(0, 256, (height, width, 3), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(4):
        x, y = random.uniform(0.1, 0.9, 2) * (width, height)
        inside = ((columns - x) / 25) ** 2 + ((rows - y) / 70) ** 2 < 1
        rgb[inside] = random.integers(0, 256, 3)
    return rgb


if __name__ == "__main__":
    raise SystemExit(main())
