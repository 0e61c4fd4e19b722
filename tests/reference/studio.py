"""A publisher that sends scenes to the browser view."""

from __future__ import annotations

import io
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from publishers import DECODED

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import COCO_PERSON
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.wire.server_keys import ServerKeys

WIDTH, HEIGHT = 320, 240
NAMES = ("background", "person", "dog")


def jpeg(colour: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def blobs(boxes: list[tuple[float, float, float, float]], *, seed: int = 1) -> Instances:
    """Return instances with uneven round masks, in boxes of a 320x240 frame."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    crops = []
    for _ in boxes:
        angle = np.arctan2(y, x)
        radius = 0.6 + 0.3 * np.sin(random.integers(2, 5) * angle + random.uniform(0, 6))
        crops.append(255 / (1 + np.exp(12 * (np.hypot(x, y) - radius))))
    count = len(boxes)
    return Instances(
        WIDTH,
        HEIGHT,
        np.array(boxes, dtype=np.float32).reshape(count, 4),
        np.linspace(0.95, 0.35, count, dtype=np.float32),
        np.array([1 + i % 2 for i in range(count)], dtype=np.int32),
        np.array(crops).reshape(count, 28, 28).astype(np.uint8),
        np.arange(1, count + 1, dtype=np.int32),
    )


def union(instances: Instances) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    for i in range(len(instances)):
        mask |= instances.mask(i)
    return mask


@dataclass
class Scene:
    instances: Instances
    jpeg: bytes | None = None
    zones: dict[str, int] = field(default_factory=dict)
    lines: dict[str, dict[str, int]] = field(default_factory=dict)


class Studio:
    """A publisher on its own thread, which sends the scene of each source 20 times per second."""

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        keys: ServerKeys | None = None,
        gateway: str | None = None,
    ) -> None:
        self._keys = keys
        self._gateways = () if gateway is None else (gateway,)
        self.scenes: dict[str, Scene] = {}
        self.subscribers = 0
        self._events: queue.Queue[tuple[str, str, dict[str, Any]]] = queue.Queue()
        self._bound: queue.Queue[str] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint,), name="studio")
        self._thread.start()
        self.endpoint = self._bound.get()

    def event(self, source: str, name: str, **data: Any) -> None:
        self._events.put((source, name, data))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, endpoint: str) -> None:
        with Publisher(
            endpoint, NAMES, keypoints=COCO_PERSON, keys=self._keys, gateways=self._gateways
        ) as publisher:
            self._bound.put(publisher.endpoint)
            index = 0
            while not self._stop.wait(0.05):
                while not self._events.empty():
                    source, name, data = self._events.get()
                    publisher.event(source, name, **data)
                for source, scene in list(self.scenes.items()):
                    publisher.publish(
                        Frame(source, index, index / 20, time.time_ns(), DECODED),
                        scene.instances,
                        jpeg=scene.jpeg,
                        zones=scene.zones,
                        lines=scene.lines,
                    )
                publisher.answer_subscriptions()
                self.subscribers = max(map(publisher.subscribers, self.scenes), default=0)
                index += 1
