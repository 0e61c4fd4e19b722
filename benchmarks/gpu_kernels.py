"""Check and time the CUDA kernels on a GPU without TensorRT.

Run: ``python -m benchmarks.gpu_kernels [--out gpu_kernels.json] [--dry]``. Needs torch and
torchvision with CUDA. It checks the shipped library and its machine code, on any GPU from compute
capability 7.5, including those that TensorRT-RTX refuses.

Steps: the results equal torchvision's; a CUDA graph; times next to torchvision's operators, with
warm and cold caches; the host time of a call while other Python threads are busy; the engine's host
time per frame, with plans that do nothing; the engine with torch in TensorRT's place; the graphs as
torch modules with the kernels bound, against torchvision, and in a CUDA graph; the checks again
with the PTX instead of the machine code, and under compute-sanitizer, where it is installed. The
JSON is written after every step, and a step that fails is recorded. ``--dry`` runs on the host
driver of the tests: its times of kernels mean nothing, its host times do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import nms, roi_align

from benchmarks.gpu_decoded import Decoded
from benchmarks.gpu_devices import HostDevice, TorchDevice
from benchmarks.gpu_report import Report
from maskcast.engines.tensorrt.plugins.library import Kernels

ROOT = Path(__file__).parents[1]
SHAPES = {
    "default 288x512": {"candidates": 2052, "kept": 300, "channels": 128, "size": (288, 512)},
    "ResNet-50-FPN 800x1344": {
        "candidates": 4819, "kept": 1000, "channels": 256, "size": (800, 1344),
    },
}  # fmt: skip
DRY_SHAPES = {"small": {"candidates": 300, "kept": 50, "channels": 4, "size": (64, 96)}}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CHILD = "MASKCAST_GPU_KERNELS_CHILD"


class Nms:
    """A case of GroupedNms on a device."""

    def __init__(self, device: Any, candidates: int, kept: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        corner = rng.uniform(0, 600, (1, candidates, 2))
        sides = rng.uniform(5, 90, corner.shape)
        self.boxes = np.concatenate([corner, corner + sides], 2).astype("f4")
        self.scores = rng.permutation(np.linspace(0.01, 0.99, candidates)).astype("f4")[None]
        self.groups = rng.integers(0, 5, (1, candidates), dtype="i4")
        self.kept, self.device, self.kernels = kept, device, Kernels()
        self.held = [device.put(a) for a in (self.boxes, self.scores, self.groups)]
        self.keep = device.put(np.zeros((1, kept), "i4"))
        size = self.kernels.nms_workspace_bytes(1, candidates)
        self.workspace = device.put(np.zeros(size, np.uint8))

    def run(self) -> None:
        point = self.device.pointer
        self.kernels.grouped_nms(
            *map(point, self.held), point(self.keep), point(self.workspace), images=1,
            candidates=self.scores.shape[1], max_output=self.kept, iou_threshold=0.7,
            score_threshold=0.0, stream=self.device.stream,
        )  # fmt: skip

    def wanted(self) -> Any:
        """Return the kept indices of torchvision on the CPU."""
        found = []
        for group in range(5):
            mine = np.flatnonzero(self.groups[0] == group)
            boxes, scores = (torch.from_numpy(a[0][mine]) for a in (self.boxes, self.scores))
            found += mine[nms(boxes, scores, 0.7).numpy()].tolist()
        found.sort(key=lambda i: -self.scores[0, i])
        return np.array((found + [-1] * self.kept)[: self.kept])


class Align:
    """A case of MultiscaleRoiAlign on a device."""

    def __init__(
        self, device: Any, boxes: int, channels: int, size: tuple[int, int], cells: int, half: bool
    ) -> None:
        rng = np.random.default_rng(1)
        dtype = "f2" if half else "f4"
        self.levels = [
            rng.standard_normal((1, channels, size[0] >> i, size[1] >> i), "f4").astype(dtype)
            for i in range(2, 6)
        ]
        centre = rng.uniform(0, 1, (boxes, 2)) * size[::-1]
        extent = np.exp(rng.uniform(np.log(4), np.log(max(size)), (boxes, 2))) / 2
        self.rois = np.concatenate([centre - extent, centre + extent], 1).astype("f4")
        self.cells, self.half, self.device, self.kernels = cells, half, device, Kernels()
        self.held = [device.put(level) for level in self.levels]
        self.boxes = device.put(self.rois)
        self.index = device.put(np.zeros(boxes, "i4"))
        self.pooled = device.put(np.zeros((boxes, channels, cells, cells), dtype))

    def run(self) -> None:
        point = self.device.pointer
        self.kernels.roi_align(
            [point(level) for level in self.held], [level.shape[2:] for level in self.levels],
            point(self.boxes), point(self.index), point(self.pooled), images=1,
            boxes=len(self.rois), channels=self.levels[0].shape[1], output_size=self.cells,
            sampling_ratio=2, aligned=False, half=self.half, stream=self.device.stream,
        )  # fmt: skip

    def wanted(self) -> Any:
        """Return what torchvision pools on the CPU, level by level."""
        area = np.prod(np.maximum(self.rois[:, 2:] - self.rois[:, :2], 0), 1)
        level = np.floor(4 + np.log2(np.sqrt(area) / 224) + 1e-6).clip(2, 5).astype(int) - 2
        regions = torch.from_numpy(np.c_[np.zeros(len(self.rois), "f4"), self.rois])
        pooled = np.zeros((len(self.rois), self.levels[0].shape[1], self.cells, self.cells), "f4")
        for i, features in enumerate(self.levels):
            mine = level == i
            given = torch.from_numpy(features.astype("f4"))
            pooled[mine] = roi_align(given, regions[mine], self.cells, 1 / (4 << i), 2).numpy()
        return pooled


def check(device: Any, shapes: dict[str, Any]) -> dict[str, Any]:
    """Compare every kernel with torchvision and numpy; raise an error if they differ."""
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        for seed in range(3):
            case = Nms(device, shape["candidates"], shape["kept"], seed)
            case.run()
            np.testing.assert_array_equal(device.get(case.keep)[0], case.wanted())
        for cells in (7, 14, 5):
            for half in (False, True):
                align = Align(device, 60, shape["channels"], shape["size"], cells, half)
                align.run()
                error = np.abs(device.get(align.pooled).astype("f4") - align.wanted()).max()
                if error > (5e-3 if half else 5e-5):
                    raise AssertionError(f"RoIAlign {cells}x{cells} differs by {error}")
                found[f"{name}, {cells}x{cells}, {'half' if half else 'float'}"] = float(error)
        pixels = shape["size"][0] * shape["size"][1]
        batch = np.random.default_rng(2).integers(0, 256, (17, pixels, 3), np.uint8)
        held = [device.put(one) for one in batch]
        images = device.put(np.zeros((17, 3, pixels), "f4"))
        pointers = [device.pointer(one) for one in held]
        Kernels().preprocess(pointers, device.pointer(images), pixels, device.stream)
        np.testing.assert_array_equal(device.get(images), batch.transpose(0, 2, 1))
        for pixel_format in ("nv12", "yuv420p"):
            decoded = Decoded(device, shape["size"], pixel_format)
            decoded.run()
            np.testing.assert_allclose(device.get(decoded.inputs), decoded.wanted(), atol=2)
        masks = np.random.default_rng(3).uniform(0, 1, 784 * 9).astype("f4")
        given, crops = device.put(masks), device.put(np.zeros(len(masks), np.uint8))
        Kernels().crops_to_bytes(
            device.pointer(given), device.pointer(crops), len(masks), device.stream
        )
        np.testing.assert_array_equal(device.get(crops), np.rint(masks * np.float32(255)))
    return found


def times(device: Any, shapes: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Time the kernels and torchvision's operators, in microseconds."""
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        case = Nms(device, shape["candidates"], shape["kept"])
        decoded = Decoded(device, shape["size"])
        works: dict[str, Callable[[], Any]] = {
            "GroupedNms": case.run,
            f"preprocess_planes {decoded.frame.width}x{decoded.frame.height}": decoded.run,
        }
        if device.name == "cuda":
            boxes, scores, groups = (held[0] for held in case.held)
            from torchvision.ops import batched_nms

            works["torchvision batched_nms"] = lambda: batched_nms(boxes, scores, groups, 0.7)  # noqa: B023
        for cells, count in ((7, shape["kept"]), (14, 100)):
            for half in (False, True):
                align = Align(device, count, shape["channels"], shape["size"], cells, half)
                kind = f"{count} boxes {cells}x{cells} {'half' if half else 'float'}"
                works[f"MultiscaleRoiAlign {kind}"] = align.run
                if device.name == "cuda":
                    regions = torch.cat([torch.zeros_like(align.boxes[:, :1]), align.boxes], 1)
                    p2 = align.held[0]
                    regions = regions.to(p2.dtype)
                    works[f"torchvision roi_align, P2 only, {kind}"] = (
                        lambda f=p2, r=regions, c=cells: roi_align(f, r, c, 0.25, 2)
                    )
        found[name] = {
            work: {
                "warm_us": device.time_us(run, repeat, cold=False),
                "cold_us": device.time_us(run, repeat, cold=True)
                if device.name == "cuda"
                else None,
            }
            for work, run in works.items()
        }
    return found


def graph(device: Any, shapes: dict[str, Any]) -> str:
    """Capture NMS and RoIAlign in a CUDA graph; check that a replay gives the same results."""
    shape = next(iter(shapes.values()))
    case = Nms(device, shape["candidates"], shape["kept"])
    align = Align(device, 50, shape["channels"], shape["size"], 7, True)

    def work() -> None:
        case.run()
        align.run()

    work()
    first = device.get(case.keep).copy(), device.get(align.pooled).copy()
    launch = device.replay(work)
    for _ in range(3):
        launch()
        np.testing.assert_array_equal(device.get(case.keep), first[0])
        np.testing.assert_array_equal(device.get(align.pooled), first[1])
    return "replayed, results equal"


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Keep threads busy with Python code that never releases the GIL by itself."""
    over = threading.Event()

    def work() -> None:
        total = 0
        while not over.is_set():
            total += sum(range(2000))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def contention(device: Any, shapes: dict[str, Any]) -> dict[str, float]:
    """Median host time of one NMS call (three launches), in microseconds."""
    case = Nms(device, next(iter(shapes.values()))["candidates"], 50)
    found = {}
    for threads in (0, 1, 4):
        with busy_threads(threads):
            passed = []
            for _ in range(100):
                start = time.perf_counter()
                case.run()
                passed.append(1e6 * (time.perf_counter() - start))
                if len(passed) % 20 == 0:
                    device.wait()
            found[f"{threads} busy threads"] = statistics.median(passed)
    return found


def child(step: str, wrapper: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run the checks of this program again, in another process."""
    command = [*wrapper, sys.executable, "-m", "benchmarks.gpu_kernels", "--check", step]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return {"exit status": 0, "last line": done.stdout.strip().splitlines()[-1:]}


def run(arguments: argparse.Namespace) -> Report:
    """Run all steps."""
    report = Report(arguments.out, dry=arguments.dry)
    results, shapes = report.results, DRY_SHAPES if arguments.dry else SHAPES
    opened: list[Any] = []

    def open_device() -> str:
        opened.append(HostDevice() if arguments.dry else TorchDevice())
        Kernels().load()
        return str(opened[0].name if arguments.dry else torch.cuda.get_device_name())

    if report.step(results, "device", open_device) is None:
        return report
    device = opened[0]
    report.step(results, "check", lambda: check(device, shapes))
    report.step(results, "graph", lambda: graph(device, shapes))
    report.step(results, "times_us", lambda: times(device, shapes, arguments.repeat))
    report.step(results, "host_time_of_nms_us", lambda: contention(device, shapes))

    def engine_host_time() -> dict[str, Any]:
        from benchmarks.gpu_host import host_time

        return host_time(dry=arguments.dry, frames=100 if arguments.dry else 500)

    report.step(results, "engine_host_time_us", engine_host_time)
    run_graphs(report, device, dry=arguments.dry)
    if not arguments.dry:
        report.step(results, "ptx", lambda: child("default", (), CUDA_FORCE_PTX_JIT="1"))
        sanitizer = shutil.which("compute-sanitizer")
        for tool in TOOLS if sanitizer else ():
            wrapper = (str(sanitizer), "--tool", tool, "--error-exitcode", "9")
            report.step(results, tool, lambda w=wrapper: child("small", w))  # type: ignore[misc]
    device.close()
    return report


def run_graphs(report: Report, device: Any, *, dry: bool) -> None:
    """Run the steps of ``benchmarks.gpu_graphs``, each into the report."""
    from benchmarks import gpu_graphs

    made: list[gpu_graphs.Graphs] = []

    def make() -> str:
        size, detections = ((96, 160), 6) if dry else ((288, 512), 100)
        made.append(gpu_graphs.Graphs(device, size, detections))
        return "default model"

    results = report.results["graphs"] = {}
    report.step(results, "model", make)
    if not made:
        return
    (graphs,) = made
    # The engine first: on the host driver, the kernels cannot run inside its work.
    batches = 4 if dry else 500
    report.step(results, "engine", lambda: gpu_graphs.engine_on_torch(graphs, batches))
    report.step(results, "kernels", lambda: gpu_graphs.bind_kernels(device))
    report.step(results, "parity", lambda: gpu_graphs.parity(graphs))
    report.step(results, "capture", lambda: gpu_graphs.capture(graphs))


def dry_run(argv: Sequence[str]) -> int:
    """Run in a child process that has the host driver as libcuda."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_on_host"))
    from host_compiler import build_host_driver

    with tempfile.TemporaryDirectory() as folder:
        build_host_driver(Path(folder))
        environment = {**os.environ, CHILD: "1", "LD_LIBRARY_PATH": folder}
        command = [sys.executable, "-m", "benchmarks.gpu_kernels", *argv]
        return subprocess.run(command, env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; return 1 if a step failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description="Check and time the CUDA kernels on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu_kernels.json"))
    parser.add_argument("--repeat", type=int, default=200, help="calls of each timing")
    parser.add_argument("--dry", action="store_true", help="on the host driver, without a GPU")
    parser.add_argument("--check", choices=("default", "small"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.dry and CHILD not in os.environ:
        return dry_run(argv)
    if arguments.check:
        print(check(TorchDevice(), SHAPES if arguments.check == "default" else DRY_SHAPES))
        return 0
    failed = run(arguments).results["failed"]
    for step, reason in failed.items():
        print(f"failed: {step}: {reason}", file=sys.stderr)
    print(arguments.out.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
