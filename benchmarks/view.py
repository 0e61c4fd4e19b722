"""Measure what the browser view costs.

Run: ``python -m benchmarks.view [--sources 4] [--fps 15] [--seconds 20] [--browser SECONDS]``.

A publisher in this process sends 1280x720 JPEG images with people-sized masks. ``maskcast view``
runs in a process of its own, with one websocket client that acknowledges each frame at once, as
a fast browser does. With ``--browser``, Chromium shows the page for that time, and its JavaScript
heap after a collection, the resident memory of its renderer, which is the tab's process, and the
proportional memory of all its processes are reported every 30 seconds.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image
from websockets.sync.client import connect

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.clients.view.process import ViewProcess
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.stages.publish import encode_jpeg

WIDTH, HEIGHT, QUALITY = 1280, 720, 80
TICKS = os.sysconf("SC_CLK_TCK")


def scene(instances: int) -> tuple[av.VideoFrame, Instances]:
    """Return a frame as detailed as video, and instances of 200x400 pixels."""
    random = np.random.default_rng(1)
    coarse = Image.fromarray(random.integers(0, 255, (90, 160, 3), dtype=np.uint8))
    frame = av.VideoFrame.from_image(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    crop = (255 / (1 + np.exp(12 * (np.hypot(x, y) - 0.8)))).astype(np.uint8)
    left = np.linspace(10, WIDTH - 220, instances, dtype=np.float32)
    boxes = np.stack([left, left * 0 + 200, left + 200, left * 0 + 600], axis=1)
    return frame, Instances(
        WIDTH,
        HEIGHT,
        boxes,
        np.full(instances, 0.9, dtype=np.float32),
        np.ones(instances, dtype=np.int32),
        np.tile(crop, (instances, 1, 1)),
        np.arange(1, instances + 1, dtype=np.int32),
    )


class Source(threading.Thread):
    """Publishes sources at a frame rate until ``stop`` is set."""

    def __init__(self, sources: int, fps: float) -> None:
        super().__init__(name="publisher")
        self.names = [f"cam{number}" for number in range(sources)]
        self.fps = fps
        self.stop = threading.Event()
        self.bound = threading.Event()
        self.endpoint = ""
        self.sent = 0

    def run(self) -> None:
        """Publish; late ticks are made up for."""
        decoded, instances = scene(5)
        jpeg = encode_jpeg(Frame("cam0", 0, 0.0, time.time_ns(), decoded), QUALITY)
        print(f"JPEG {len(jpeg) / 1000:.0f} kB")
        with Publisher("tcp://127.0.0.1:0", ("background", "person")) as publisher:
            self.endpoint = publisher.endpoint
            self.bound.set()
            due_s, index = time.monotonic(), 0
            while not self.stop.wait(max(due_s - time.monotonic(), 0)):
                due_s += 1 / self.fps
                for name in self.names:
                    frame = Frame(name, index, index / self.fps, time.time_ns(), decoded)
                    publisher.publish(frame, instances, jpeg=jpeg)
                    self.sent += 1
                index += 1


def processor_s(pid: int) -> float:
    """Return the processor time of a process so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure_server(view: ViewProcess, source: Source, seconds: float) -> None:
    """Receive as a fast browser does, and print the server's share of a core."""
    address = view.url.replace("http:", "ws:") + "stream"
    with connect(address, max_size=None, compression=None) as client:
        client.send("")
        ages_ms: list[float] = []
        began_s = began_cpu_s = 0.0
        sent = 0
        warm_until_s = time.monotonic() + 3
        while not began_s or time.monotonic() < began_s + seconds:
            message = client.recv(timeout=10)
            if isinstance(message, str):
                continue
            header_bytes = struct.unpack_from("<I", message, 8)[0]
            name = message[16 : 16 + header_bytes].split(b'"', 4)[3].decode()
            client.send(name)
            if began_s:
                ages_ms.append(struct.unpack_from("<d", message)[0])
            elif time.monotonic() > warm_until_s:
                began_s, began_cpu_s, sent = time.monotonic(), processor_s(view.pid), source.sent
        spent_s = processor_s(view.pid) - began_cpu_s
        wall_s = time.monotonic() - began_s
        sent = source.sent - sent
    print(
        f"server: {100 * spent_s / wall_s:.1f} % of a core, "
        f"{1000 * spent_s / len(ages_ms):.2f} ms of processor time per frame, "
        f"{len(ages_ms)} of {sent} frames in {wall_s:.0f} s, "
        f"age when sent {np.median(ages_ms):.1f} ms (median), "
        f"{np.percentile(ages_ms, 99):.1f} ms (99th percentile)"
    )


def measure_tab(view: ViewProcess, seconds: float) -> None:
    """Show the page in Chromium and print its memory."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (
            *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *("disable-dev-shm-usage", "enable-precise-memory-info", f"user-data-dir={profile}"),
        ):
            options.add_argument(f"--{argument}")
        driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")
        )
        try:
            driver.get(view.url)
            began_s = time.monotonic()
            while (passed_s := time.monotonic() - began_s) < seconds:
                time.sleep(min(30, max(seconds - passed_s, 0.1)))
                driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
                heap = driver.execute_script("return performance.memory.usedJSHeapSize")
                cells = driver.find_elements("css selector", "[data-part=fps]")
                fps = [cell.text for cell in cells]
                print(
                    f"after {time.monotonic() - began_s:.0f} s: heap {heap / 1e6:.1f} MB, "
                    f"renderer {renderer_mb(tree(driver.service.process.pid)):.0f} MB, "
                    f"Chromium {shared_mb(tree(driver.service.process.pid)):.0f} MB, "
                    f"fps {', '.join(fps)}",
                    flush=True,
                )
        finally:
            driver.quit()


def tree(root: int) -> set[int]:
    """Return the ids of a process and its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def read_kb(pid: int, file: str, key: str) -> int:
    """Return a figure of /proc in kB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def shared_mb(pids: set[int]) -> float:
    """Return the memory of processes with their share of what they share (PSS), MB."""
    return sum(read_kb(pid, "smaps_rollup", "Pss") for pid in pids) / 1000


def renderer_mb(pids: set[int]) -> float:
    """Return the resident memory (RSS) of the largest renderer among processes, MB."""
    renderers = [0]
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"--type=renderer" in command:
            renderers.append(read_kb(pid, "status", "VmRSS"))
    return max(renderers) / 1000


def measure_jpeg() -> None:
    """Print what a JPEG costs the pipeline's publish stage."""
    decoded, _ = scene(5)
    frame = Frame("cam0", 0, 0.0, time.time_ns(), decoded.reformat(format="yuv420p"))
    began_s = time.process_time()
    for _ in range(50):
        encode_jpeg(frame, QUALITY)
    print(f"pipeline: {1000 * (time.process_time() - began_s) / 50:.1f} ms of processor per JPEG")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--fps", type=float, default=15)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--browser", type=float, default=0, help="seconds to watch Chromium")
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    measure_jpeg()
    source = Source(arguments.sources, arguments.fps)
    source.start()
    source.bound.wait()
    try:
        with ViewProcess(source.endpoint, "127.0.0.1:0") as view:
            time.sleep(2)
            measure_server(view, source, arguments.seconds)
            if arguments.browser:
                measure_tab(view, arguments.browser)
    finally:
        source.stop.set()
        source.join()


if __name__ == "__main__":
    main()
