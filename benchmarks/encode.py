"""Measure the size of messages, their encoding and decoding, and their latency.

Run: ``python -m benchmarks.encode [--json] [--repeat N]``. One thread, no engine, synthetic
instances: ellipses in a 1920 x 1080 image, boxes 24 to 400 pixels a side.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import av
import numpy as np

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame
from maskcast.pipeline.wire.message import (
    InstancesHeader,
    InstancesMessage,
    MaskFormat,
    decode,
    encode,
)

WIDTH, HEIGHT = 1920, 1080
COUNTS = (1, 10, 100)


def ellipses(count: int, seed: int = 0) -> Instances:
    """Make instances whose masks are ellipses with soft, slightly noisy edges."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(24, 400, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - size)
    axis = np.linspace(-1, 1, 28)
    distance = axis[:, None] ** 2 + axis[None] ** 2
    noise = rng.normal(0, 0.02, (count, 28, 28))
    crops = 1 / (1 + np.exp(12 * (distance[None] - 0.8 + noise)))
    return Instances(
        WIDTH,
        HEIGHT,
        boxes=np.concatenate([corner, corner + size], axis=1).astype(np.float32),
        scores=np.sort(rng.uniform(0.5, 1, count).astype(np.float32))[::-1].copy(),
        labels=np.ones(count, dtype=np.int32),
        masks=np.rint(crops * 255).astype(np.uint8),
    )


def message(instances: Instances, masks: MaskFormat) -> InstancesMessage:
    """Wrap instances in a message as the publish stage does."""
    now_ns = time.time_ns()
    header = InstancesHeader(
        publisher="0123456789abcdef",
        seq=123456,
        index=123456,
        capture_ns=now_ns,
        publish_ns=now_ns,
        width=instances.width,
        height=instances.height,
        count=len(instances),
        masks=masks,
        labels="01234567",
        pts_s=4115.2,
        stage_ms={"decode": 2.1, "preprocess": 3.2, "infer": 31.4, "masks": 4.9},
        drops={"decode": {"replaced": 12}},
    )
    return InstancesMessage("camera-1", header, instances)


def percentiles_ms(act: Callable[[], object], repeat: int) -> dict[str, float]:
    """Time ``repeat`` calls, after a tenth as many for warm-up."""
    for _ in range(max(repeat // 10, 1)):
        act()
    took = np.zeros(repeat)
    for i in range(repeat):
        start = time.perf_counter()
        act()
        took[i] = time.perf_counter() - start
    return {
        "p50_ms": float(np.percentile(took, 50) * 1e3),
        "p99_ms": float(np.percentile(took, 99) * 1e3),
    }


def loopback_ms(count: int, masks: MaskFormat, frames: int) -> dict[str, float]:
    """Measure the time from ``publish`` until a subscriber over TCP has the decoded frame."""
    instances, took = ellipses(count), []
    with Publisher("tcp://127.0.0.1:0", ["background", "thing"], masks=masks) as publisher:
        endpoint = publisher.endpoint

        def read() -> None:
            for frame in subscribe(endpoint, policy="all"):
                assert isinstance(frame, PublishedFrame)
                took.append(frame.age_ms)

        reader = threading.Thread(target=read)
        reader.start()
        publisher.wait_for_subscribers(1, 5.0, ["camera-1"])
        decoded = av.VideoFrame(16, 16)
        for index in range(frames):
            publisher.publish(Frame("camera-1", index, None, time.time_ns(), decoded), instances)
            time.sleep(0.01)
        publisher.event("camera-1", "ended")
        reader.join()
    return {"p50_ms": float(np.percentile(took, 50)), "p99_ms": float(np.percentile(took, 99))}


def measure(repeat: int) -> list[dict[str, Any]]:
    """Measure every format with every count of instances."""
    rows = []
    for masks in get_args(MaskFormat):
        for count in COUNTS:
            one = message(ellipses(count), masks)
            parts = encode(one)
            rows.append(
                {
                    "masks": masks,
                    "instances": count,
                    "bytes": sum(map(len, parts)),
                    "encode": percentiles_ms(partial(encode, one), repeat),
                    "decode": percentiles_ms(partial(decode, parts), repeat),
                    "loopback": loopback_ms(count, masks, max(repeat // 2, 10)),
                }
            )
    return rows


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeat", type=int, default=200)
    arguments = parser.parse_args()
    rows = measure(arguments.repeat)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    columns = "".join(f"   {name + ' p50 / p99':>19}" for name in ("encode", "decode", "loopback"))
    print(f"{'masks':<10} {'instances':>9} {'bytes':>8}{columns} ms")
    for row in rows:
        times = "   ".join(
            f"{row[name]['p50_ms']:9.3f} / {row[name]['p99_ms']:7.3f}"
            for name in ("encode", "decode", "loopback")
        )
        print(f"{row['masks']:<10} {row['instances']:9d} {row['bytes']:8d}   {times}")


if __name__ == "__main__":
    main()
