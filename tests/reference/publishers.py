"""Publishers for the tests of subscribers: what a pipeline sends, or any messages."""

import time

import av
import numpy as np
import zmq

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    encode,
)

NAMES = ("background", "person")
DECODED = av.VideoFrame(64, 48)


def seen(count=2):
    boxes = np.tile(np.array([4, 4, 40, 40], dtype=np.float32), (count, 1))
    scores, labels = np.ones(count, dtype=np.float32), np.ones(count, dtype=np.int32)
    crops = np.full((count, 28, 28), 255, dtype=np.uint8)
    return Instances(64, 48, boxes, scores, labels, crops)


def frame(source="cam1", index=0):
    return Frame(source, index, index / 25, time.time_ns(), DECODED)


class Script:
    """A publisher that sends exactly the messages that it is given, valid or not."""

    def __init__(self):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.SNDHWM, 100_000)
        self._socket.set(zmq.XPUB_VERBOSE, 1)
        self.endpoint, self.second_endpoint = (
            f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
            for _ in range(2)
        )

    def wait(self):
        """Wait for a subscription."""
        while True:
            assert self._socket.poll(60_000)
            if self._socket.recv()[:1] == b"\x01":
                return

    def send(self, parts):
        self._socket.send_multipart(parts)

    def instances(self, seq, source="cam1", publisher="a" * 16, jpeg=None):
        header = InstancesHeader(
            publisher=publisher,
            seq=seq,
            index=2 * seq,
            capture_ns=time.time_ns(),
            publish_ns=time.time_ns(),
            width=64,
            height=48,
            count=2,
            masks="crop_u8",
        )
        self.send(encode(InstancesMessage(source, header, seen(), jpeg)))

    def event(self, name, seq=0, source="cam1", sent=0, **data):
        header = EventHeader(
            publisher="a" * 16, seq=seq, publish_ns=time.time_ns(), event=name, sent=sent, data=data
        )
        self.send(encode(EventMessage(source, header)))

    def close(self):
        self._context.destroy(linger=0)
