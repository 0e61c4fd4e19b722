"""Helpers for tests of whole pipelines: short configurations, and records of what arrives."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame, StreamEvent


def configured(*urls: Path | str | dict[str, Any], publish: dict[str, Any] | None = None) -> Config:
    sources = [url if isinstance(url, dict) else {"url": str(url)} for url in urls]
    return make_config({"sources": sources, "publish": publish})


class Log:
    """A recorder that keeps the numbers of its frames."""

    def __init__(self) -> None:
        self.indices: dict[str, list[int]] = defaultdict(list)
        self.published: dict[str, list[Published]] = defaultdict(list)
        self.threads: set[str] = set()
        self.closed = 0

    def write(self, frame, instances, published: Published) -> None:
        self.indices[frame.source].append(frame.index)
        self.published[frame.source].append(published)
        self.threads.add(threading.current_thread().name)

    def close(self) -> None:
        self.closed += 1
        self.threads.add(threading.current_thread().name)


class Listener:
    """A subscriber on its own thread, from before the pipeline starts to its end."""

    def __init__(self, endpoint: str) -> None:
        self.frames: list[PublishedFrame] = []
        self.events: list[StreamEvent] = []
        self._endpoint = endpoint
        self._thread = threading.Thread(target=self._listen, name="listener")
        self._thread.start()

    def _listen(self) -> None:
        for item in subscribe(self._endpoint, policy="all", events=True, timeout_s=60):
            (self.events if isinstance(item, StreamEvent) else self.frames).append(item)

    def finish(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive()

    def ended(self) -> dict[str, str]:
        """Return why each source ended."""
        return {
            event.source: event.data["reason"] for event in self.events if event.name == "ended"
        }


def wait_until(condition: Callable[[], Any], timeout_s: float = 200.0, what: str = "") -> Any:
    """Wait until a condition is true, and return its value; only a defect lets it time out."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.02)
    return value
