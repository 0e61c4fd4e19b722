"""Compare pipelines and transports with the same engine and clip, in one run.

Run: ``python -m benchmarks.peers CLIP [--limit 300] [--python NAME=PYTHON ...]``.

Each program below decodes the clip, runs maskcast's own engine (default model, mode latency) on
every frame, and sends the result to one receiver in another process, over TCP on loopback:

- ``maskcast``: ``maskcast.run``; boxes, scores and mask crops.
- ``cv2``: a loop over ``cv2.VideoCapture`` as users write it; a dictionary of arrays with full-size
  masks by pyzmq's ``send_pyobj``.
- ``imagezmq``: the same loop; frames with the masks drawn in, and the boxes as text, by
  ``imagezmq.ImageSender`` (PUB/SUB).
- ``vidgear``: frames from ``CamGear`` and to ``NetGear`` (publish/subscribe, JPEG), with the boxes.
- ``inference``: Roboflow's ``InferencePipeline.init_with_custom_logic``; arrays as in ``cv2``.

A program runs in this interpreter, or in the one that ``--python`` names for it, so that each peer
can have an environment of its own: it needs the peer, and numpy, av, openvino, msgspec, pillow,
pyyaml and pyzmq. A peer that is not installed is reported as such.

Reported: frames per second from the first to the last frame, processor time per frame of the
sending process, the 95th percentile of the time from the end of decoding to receipt, bytes per
frame, and the frames received. The receiver stops for two seconds halfway, to show whether losses
are noticed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "maskcast": ("openvino",),
    "cv2": ("opencv-python-headless", "pyzmq"),
    "imagezmq": ("imagezmq", "opencv-python-headless"),
    "vidgear": ("vidgear", "opencv-python-headless"),
    "inference": ("inference", "opencv-python-headless", "pyzmq"),
}
END = "end"
STALL_S = 2.0
CONNECT_S = 8.0
"""Seconds that a receiver without a handshake has to start and to connect."""


class Meter:
    """Measures a sender, from its first frame to its last."""

    def __init__(self, limit: int) -> None:
        self.frames = self.bytes = 0
        self.limit = limit
        self._before = 0
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)

    def start(self) -> None:
        """Start measuring, at the first call; frames sent before do not count."""
        if self._began is None:
            self._before = self.frames
            self._began = (time.monotonic(), time.process_time())

    def sent(self, size: int) -> None:
        """Count a sent frame."""
        self.frames += 1
        self.bytes += size
        self._ended = (time.monotonic(), time.process_time())

    def report(self) -> dict[str, float]:
        """Return frames, frames per second, processor time and bytes per frame."""
        assert self._began is not None
        wall_s, spent_s = (end - began for end, began in zip(self._ended, self._began, strict=True))
        measured = self.frames - self._before
        return {
            "frames": self.frames,
            "fps": measured / wall_s,
            "processor_ms": 1e3 * spent_s / measured,
            "bytes": self.bytes / self.frames,
        }


def make_detector() -> Callable[[Any], Any]:
    """Return a function that maps a BGR image to instances."""
    import av

    from maskcast.engines.image import fit_image
    from maskcast.engines.load import load_engine

    engine = load_engine(mode="latency")
    manifest = engine.manifest

    def detect(image: Any) -> Any:
        frame = av.VideoFrame.from_ndarray(image, format="bgr24")
        fitted = fit_image(frame, 0, manifest.input)
        (instances,) = engine.run([fitted], manifest.score_threshold)
        return instances

    detect(np.zeros((432, 768, 3), np.uint8))  # compiles for the clip's shape
    return detect


def read_clip(clip: str, meter: Meter) -> Iterator[tuple[Any, int]]:
    """Yield the frames of a clip and the time at which each was decoded, ns."""
    import cv2

    capture = cv2.VideoCapture(clip)
    while meter.frames < meter.limit:
        meter.start()
        found, image = capture.read()
        if not found:
            return
        yield image, time.time_ns()


def full_masks(instances: Any) -> Any:
    """Return full-size masks, bool ``[N, height, width]``."""
    masks = np.zeros((len(instances), instances.height, instances.width), np.bool_)
    for number in range(len(instances)):
        masks[number] = instances.mask(number)
    return masks


def draw(image: Any, instances: Any) -> Any:
    """Tint the masks of a frame."""
    for mask in full_masks(instances):
        image[mask] = image[mask] // 2 + np.array([127, 0, 0], np.uint8)
    return image


# ---- Senders: each sends all frames, then END


def send_maskcast(clip: str, port: int, meter: Meter) -> None:
    """Send with ``maskcast.run``'s own pipeline."""
    import maskcast

    engine = maskcast.load_engine(mode="latency")
    config = maskcast.Config(
        sources=[clip],
        publish=maskcast.PublishConfig(endpoint=f"tcp://127.0.0.1:{port}", wait_subscribers=1),
    )
    counted = _CountBytes(meter)
    pipeline = maskcast.Pipeline(config, engine, limit=meter.limit, witness=counted)
    pipeline.run()
    engine.close()


class _CountBytes:
    def __init__(self, meter: Meter) -> None:
        from maskcast.pipeline.publisher.outlet import BoundOutlet

        self._meter = meter
        self._size = 0
        send = BoundOutlet.send

        def count(outlet: Any, parts: Any) -> None:
            self._size += sum(map(len, parts))
            send(outlet, parts)

        BoundOutlet.send = count  # type: ignore[method-assign]

    def published(self, frame: Any, seq: int) -> None:
        self._meter.sent(self._size)
        self._meter.start()  # after the first frame, which is not measured
        self._size = 0

    def dropped(self, frame: Any, stage: str, reason: str) -> None:
        raise AssertionError("a file loses no frame")


@contextmanager
def plain_publisher(port: int) -> Iterator[Any]:
    """Yield a socket for pickled objects, as users open it; send END at the end."""
    import zmq

    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.bind(f"tcp://127.0.0.1:{port}")
    wait_for_receiver()
    yield publisher
    time.sleep(0.5)
    publisher.send_pyobj(END)
    publisher.close()
    context.term()


def send_cv2(clip: str, port: int, meter: Meter) -> None:
    """Send arrays as users do: pickled."""
    detect = make_detector()
    with plain_publisher(port) as publisher:
        for image, decoded_ns in read_clip(clip, meter):
            send_arrays(publisher, detect(image), decoded_ns, meter)


def send_arrays(publisher: Any, instances: Any, decoded_ns: int, meter: Meter) -> None:
    """Send a dictionary of arrays, pickled."""
    message = {
        "decoded_ns": decoded_ns,
        "boxes": instances.boxes,
        "scores": instances.scores,
        "masks": full_masks(instances),
    }
    publisher.send_pyobj(message)
    meter.sent(sum(getattr(value, "nbytes", 8) for value in message.values()))


def send_inference(clip: str, port: int, meter: Meter) -> None:
    """Read with ``InferencePipeline``, send as ``cv2`` does."""
    from inference import InferencePipeline

    detect = make_detector()

    def run_model(frames: Any) -> list[Any]:
        meter.start()
        return [(time.time_ns(), detect(frame.image)) for frame in frames]

    with plain_publisher(port) as publisher:

        def send_result(result: Any, _: Any) -> None:
            if meter.frames < meter.limit:
                send_arrays(publisher, result[1], result[0], meter)
            else:
                pipeline.terminate()

        pipeline = InferencePipeline.init_with_custom_logic(
            video_reference=clip, on_video_frame=run_model, on_prediction=send_result
        )
        pipeline.start(use_main_thread=False)
        pipeline.join()


def send_imagezmq(clip: str, port: int, meter: Meter) -> None:
    """Send drawn frames."""
    import imagezmq

    detect = make_detector()
    sender = imagezmq.ImageSender(f"tcp://127.0.0.1:{port}", REQ_REP=False)
    wait_for_receiver()
    for image, decoded_ns in read_clip(clip, meter):
        instances = detect(image)
        text = json.dumps({"decoded_ns": decoded_ns, "boxes": instances.boxes.tolist()})
        drawn = draw(image, instances)
        sender.send_image(text, drawn)
        meter.sent(len(text) + drawn.nbytes)
    time.sleep(0.5)
    sender.send_image(END, np.zeros((1, 1, 3), np.uint8))
    sender.close()


def send_vidgear(clip: str, port: int, meter: Meter) -> None:
    """Read with ``CamGear``, send with ``NetGear``."""
    import cv2
    from vidgear.gears import CamGear, NetGear

    detect = make_detector()
    server = NetGear(
        address="127.0.0.1", port=str(port), protocol="tcp", pattern=2, logging=False,
        multiserver_mode=True,  # in this mode a frame may carry a message
        jpeg_compression=True, jpeg_compression_quality=80,
    )  # fmt: skip
    wait_for_receiver()
    stream = CamGear(source=clip).start()
    while meter.frames < meter.limit:
        meter.start()
        image = stream.read()
        if image is None:
            break
        decoded_ns = time.time_ns()
        instances = detect(image)
        drawn = draw(image, instances)
        message = {"decoded_ns": decoded_ns, "boxes": instances.boxes.tolist()}
        server.send(drawn, message=message)
        if meter.frames % 50 == 0:  # its own JPEG is not visible from outside
            jpeg_bytes = len(cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 80])[1])
        meter.sent(jpeg_bytes + len(json.dumps(message)))
    stream.stop()
    time.sleep(0.5)
    server.send(np.zeros((8, 8, 3), np.uint8), message=END)
    server.close()


# ---- Receivers: each yields the time of decoding of every frame, and what it knows to be lost


def receive_maskcast(port: int) -> Iterator[tuple[int, int]]:
    """Receive with ``maskcast.subscribe``."""
    import maskcast

    endpoint = f"tcp://127.0.0.1:{port}"
    for frame in maskcast.subscribe(endpoint, policy="all", timeout_s=120):
        yield frame.capture_ns, frame.lost_before


def receive_cv2(port: int) -> Iterator[tuple[int, int]]:
    """Receive with a SUB socket."""
    import zmq

    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(f"tcp://127.0.0.1:{port}")
    while (message := subscriber.recv_pyobj()) != END:
        yield message["decoded_ns"], 0
    subscriber.close()
    context.term()


def receive_imagezmq(port: int) -> Iterator[tuple[int, int]]:
    """Receive with ``imagezmq.ImageHub``."""
    import imagezmq

    hub = imagezmq.ImageHub(f"tcp://127.0.0.1:{port}", REQ_REP=False)
    while (text := hub.recv_image()[0]) != END:
        yield json.loads(text)["decoded_ns"], 0
    hub.close()


def receive_vidgear(port: int) -> Iterator[tuple[int, int]]:
    """Receive with ``NetGear``."""
    from vidgear.gears import NetGear

    client = NetGear(
        receive_mode=True, address="127.0.0.1", port=(str(port),), protocol="tcp", pattern=2,
        multiserver_mode=True, jpeg_compression=True, logging=False,
        request_timeout=300, max_retries=3,  # the sender loads its model first
    )  # fmt: skip
    while (received := client.recv()) is not None:
        _, message, _ = received
        if message == END:
            break
        yield message["decoded_ns"], 0
    client.close()


SENDERS = {
    "maskcast": send_maskcast,
    "cv2": send_cv2,
    "imagezmq": send_imagezmq,
    "vidgear": send_vidgear,
    "inference": send_inference,
}
RECEIVERS: dict[str, Callable[[int], Iterator[tuple[int, int]]]] = {
    "maskcast": receive_maskcast,
    "cv2": receive_cv2,
    "imagezmq": receive_imagezmq,
    "vidgear": receive_vidgear,
    "inference": receive_cv2,
}


def wait_for_receiver() -> None:
    """Wait until the receiver has had time to connect."""
    time.sleep(CONNECT_S)


def send(name: str, clip: str, port: int, limit: int) -> None:
    """Run as the sender."""
    meter = Meter(limit)
    SENDERS[name](clip, port, meter)
    versions = ", ".join(f"{one} {_version(one)}" for one in PACKAGES[name])
    print(json.dumps({**meter.report(), "versions": versions}), flush=True)


def receive(name: str, port: int, limit: int) -> None:
    """Run as the receiver: measure the age of frames, pause halfway, count losses."""
    ages_ms: list[float] = []
    noticed = count = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        for decoded_ns, lost in RECEIVERS[name](port):
            count += 1
            noticed += lost
            if count <= limit // 2:  # frames after the pause are late because of it
                ages_ms.append((time.time_ns() - decoded_ns) / 1e6)
            if count == limit // 2:
                time.sleep(STALL_S)
    p95_ms = float(np.percentile(ages_ms, 95)) if ages_ms else float("nan")
    found = {"received": count, "noticed": noticed, "p95_ms": p95_ms}
    print(json.dumps(found), flush=True)
    os._exit(0)  # threads of a peer may still be waiting


def measure(name: str, python: str, clip: str, limit: int) -> dict[str, Any] | None:
    """Run a program and its receiver; None if it cannot run here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [name, "--port", str(port), "--limit", str(limit)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    base = [python, "-m", "benchmarks.peers", clip]
    receiver = subprocess.Popen(
        [*base, "--receive", *common], stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    sender = subprocess.Popen(
        [*base, "--send", *common], stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    watchdog = threading.Timer(600, sender.kill)
    watchdog.start()
    try:
        lines = sender.communicate()[0].splitlines()
        if sender.returncode != 0:
            return None
        sent = json.loads(lines[-1])
        return sent | _received(receiver)
    finally:
        watchdog.cancel()
        receiver.kill()
        receiver.wait()


def _received(receiver: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return a receiver's report; terminate one that has missed the end."""
    try:
        lines = receiver.communicate(timeout=30)[0].splitlines()
    except subprocess.TimeoutExpired:
        receiver.terminate()
        try:
            lines = receiver.communicate(timeout=30)[0].splitlines()
        except subprocess.TimeoutExpired:
            lines = []
    nothing: dict[str, Any] = {"received": 0, "noticed": 0, "p95_ms": float("nan")}
    return json.loads(lines[-1]) if lines else nothing


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def main() -> None:
    """Measure and print a table, or run as one of the programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clip")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=[*SENDERS], default=[*SENDERS])
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--send", choices=[*SENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--receive", choices=[*SENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        send(arguments.send, arguments.clip, arguments.port, arguments.limit)
        return
    if arguments.receive:
        receive(arguments.receive, arguments.port, arguments.limit)
        return
    pythons = dict(item.split("=", 1) for item in arguments.python)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| pipeline | frames/s | processor ms/frame | p95 ms | bytes/frame | lost, noticed |")
    print("|---|---|---|---|---|---|")
    for name in arguments.only:
        found = measure(name, pythons.get(name, sys.executable), arguments.clip, arguments.limit)
        if found is None:
            print(f"| {name} | does not run here | | | | |", flush=True)
            continue
        lost = int(found["frames"] - found["received"])
        print(
            f"| {name} ({found['versions']}) | {found['fps']:.1f} | {found['processor_ms']:.1f} "
            f"| {found['p95_ms']:.0f} | {found['bytes']:,.0f} | {lost}, {found['noticed']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
