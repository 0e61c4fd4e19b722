"""Decoding: compares decoding by hardware and in software, in time and in processor time."""

from __future__ import annotations

import threading
import time
from itertools import islice

import msgspec

from maskcast.pipeline.configuration.config import DECODE_DEVICES, SourceConfig
from maskcast.pipeline.sources.ffmpeg import device_problem
from maskcast.pipeline.sources.open import create_source

DECODED_FRAMES = 300
"""At most this many frames are decoded by each decoder."""


class DecoderTimes(msgspec.Struct, frozen=True):
    """Decoding alone, milliseconds per frame.

    Attributes:
        wall: time that passed.
        processor: processor time, all cores together.
    """

    wall: float
    processor: float


class DecodingReport(msgspec.Struct, frozen=True):
    """The decoder of a run, and the times of all decoders alone.

    Attributes:
        decoder: the decoder of the run: ``software``, ``cuda`` or ``vaapi``.
        alone_ms: times by decoder: software and each available device; {} if no device is available
            or the source is not a file.
        absent: by device, why it was not measured.
    """

    decoder: str
    alone_ms: dict[str, DecoderTimes]
    absent: dict[str, str]

    def sentence(self) -> str:
        """Describe the decoder of the run, and whether hardware helps."""
        software = self.alone_ms.get("software")
        parts = [f"decoded by {self.decoder}" if self.decoder != "software" else "in software"]
        for device, times in self.alone_ms.items():
            if device != "software" and software is not None:
                parts.append(
                    f"{device} takes {times.wall:.2f} ms per frame and {times.processor:.2f} ms of "
                    f"processor time, software {software.wall:.2f} and {software.processor:.2f}: "
                    f"{_verdict(times, software)}"
                )
        parts += [f"{device}: {reason}" for device, reason in self.absent.items()]
        return "; ".join(parts)


def measure_decoding(
    config: SourceConfig, decoder: str, count: int | None, stop: threading.Event
) -> DecodingReport:
    """Decode the beginning of a source with every available decoder.

    Args:
        config: the source.
        decoder: what decoded it in the run.
        count: number of its frames; None if it is not a file, which is then not decoded.
        stop: ends the measurement early; incomplete measurements are left out.
    """
    problems = {device: device_problem(device) for device in DECODE_DEVICES}
    present = [device for device, problem in problems.items() if not problem]
    absent: dict[str, str] = {device: problem for device, problem in problems.items() if problem}
    alone_ms: dict[str, DecoderTimes] = {}
    if count is None:
        absent |= dict.fromkeys(present, "compared on files only")
    elif present:
        frames = min(count, DECODED_FRAMES)
        for one in ("software", *present):
            source = msgspec.structs.replace(config, decode=one, loop=False, policy="block")
            used, times = _time(source, frames)
            if stop.is_set():
                break
            if used == one:
                alone_ms[one] = times
            else:
                absent[one] = "it does not decode this video"
    return DecodingReport(decoder, alone_ms, absent)


def _time(config: SourceConfig, frames: int) -> tuple[str, DecoderTimes]:
    """Time the frames after the first one, which starts a device; return the decoder, too."""
    with create_source(config) as source:
        decoded = iter(source)
        used = next(decoded).decoder
        began_s, spent_s = time.perf_counter(), time.process_time()
        count = max(1, sum(1 for _ in islice(decoded, frames - 1)))
        wall_s, spent_s = time.perf_counter() - began_s, time.process_time() - spent_s
    return used, DecoderTimes(1e3 * wall_s / count, 1e3 * spent_s / count)


def _verdict(device: DecoderTimes, software: DecoderTimes) -> str:
    if device.processor >= software.processor:
        return "it does not help"
    if device.wall > software.wall:
        return "it saves processor time, but is slower"
    return "it helps"
