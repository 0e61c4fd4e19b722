"""Clip video: draws the instances of a recording into its images, and writes a video."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
from PIL import Image

from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.outputs.video import VideoRecorder
from maskcast.pipeline.subscriber.received import PublishedFrame
from maskcast.pipeline.subscriber.subscribe import subscribe


def render(recording: Path, path: Path) -> int:
    """Write the video of a recording of one source.

    Args:
        recording: an MCAP file.
        path: the video, ``.mp4`` or ``.mkv``.

    Returns:
        The number of frames written. Messages without an image are left out; if none has an image,
        no file is written.

    Raises:
        InputError: the recording cannot be read.
        OSError, av.FFmpegError: the video cannot be written.
    """
    recorder: VideoRecorder | None = None
    count = 0
    with ExitStack() as closing:
        for received in subscribe(f"file:{recording}"):
            if (image := received.image()) is None:
                continue
            if recorder is None:
                recorder = VideoRecorder(path, _label_names(received), keypoints=received.keypoints)
                closing.callback(recorder.close)
            published = Published(received.seq, received.publish_ns, received.dropped_before)
            recorder.write(_frame(received, Image.fromarray(image)), received.instances, published)
            count += 1
    return count


def _frame(received: PublishedFrame, image: Image.Image) -> Frame:
    """Return a frame with the image, resized to the frame size that the boxes refer to."""
    size = received.instances.width, received.instances.height
    pixels = np.asarray(image if image.size == size else image.resize(size))
    return Frame(
        source=received.source,
        index=received.index,
        pts_s=received.pts_s,
        capture_ns=received.capture_ns,
        decoded=av.VideoFrame.from_ndarray(pixels, format="rgb24"),
    )


def _label_names(received: PublishedFrame) -> tuple[str, ...]:
    """Return the label names; numbers if the recording has none."""
    if received.label_names:
        return received.label_names
    return tuple(str(label) for label in range(1 + int(received.instances.labels.max(initial=0))))
