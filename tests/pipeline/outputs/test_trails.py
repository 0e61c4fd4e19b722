from pathlib import Path

import av
import numpy as np
from PIL import Image
from recorded import frame, published

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.outputs.draw import palette
from maskcast.pipeline.outputs.trails import MAX_POINTS, Trails
from maskcast.pipeline.outputs.video import VideoRecorder


def at(x: float, track_id: int = 1) -> Instances:
    return Instances(
        width=200,
        height=100,
        boxes=np.float32([[x - 5, 20, x + 5, 60]]),
        scores=np.float32([0.9]),
        labels=np.int32([1]),
        track_ids=np.int32([track_id]),
    )


def drawn(image: Image.Image, track_id: int) -> set[int]:
    """Return the columns that have the colour of a track."""
    pixels = np.asarray(image)
    return set(np.flatnonzero((pixels == palette(track_id)).all(axis=2).any(axis=0)).tolist())


def follow(trails: Trails, places: list[tuple[float, float]], track_id: int = 1) -> Image.Image:
    image = Image.new("RGB", (200, 100))
    for time_s, x in places:
        image = Image.new("RGB", (200, 100))
        trails.draw(image, at(x, track_id), time_s)
    return image


def test_a_trail_joins_the_places_of_a_track_at_its_feet() -> None:
    image = follow(Trails(5.0), [(0.0, 20), (1.0, 60), (2.0, 120)])
    assert set(range(25, 116)) <= drawn(image, 1)
    rows = np.flatnonzero(np.asarray(image).any(axis=(1, 2)))
    assert rows.min() >= 58
    assert rows.max() <= 62


def test_a_trail_forgets_what_is_older_than_its_duration() -> None:
    image = follow(Trails(1.5), [(0.0, 20), (1.0, 60), (2.0, 120)])
    assert not drawn(image, 1) & set(range(15, 50))


def test_an_instance_without_a_track_has_no_trail() -> None:
    image = follow(Trails(5.0), [(0.0, 20), (1.0, 60)], track_id=0)
    assert not np.asarray(image).any()


def test_times_that_go_back_start_trails_again() -> None:
    trails = Trails(5.0)
    follow(trails, [(100.0, 20), (101.0, 60)])
    assert not drawn(follow(trails, [(0.0, 150)]), 1)


def test_memory_is_bounded() -> None:
    trails = Trails(60.0)
    for n in range(5000):
        trails.draw(Image.new("RGB", (200, 100)), at(50, 1 + n % 3), n * 0.001)
    assert sum(len(points) for points in trails._points.values()) == 3 * MAX_POINTS
    follow(trails, [(1000.0, 50)])
    assert len(trails._points) == 1


def test_a_recorded_video_shows_trails(tmp_path: Path) -> None:
    def red(trail_s: float | None) -> int:
        path = tmp_path / f"{trail_s}.mp4"
        recorder = VideoRecorder(path, ("background", "person"), trail_s=trail_s)
        for index in range(4):
            where = at(20 + 40 * index)
            recorder.write(frame(index, size=(200, 100)), where, published(index))
        recorder.close()
        with av.open(str(path)) as container:
            *_, last = (f.to_ndarray(format="rgb24") for f in container.decode(video=0))
        return int((last[56:64, 20:130].max(axis=2) > 100).sum())

    assert red(5.0) > red(None) + 100
