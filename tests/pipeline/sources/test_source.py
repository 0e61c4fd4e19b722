import threading
import time

from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.open import create_source
from maskcast.pipeline.sources.source import Pace


def test_files_block_and_cameras_replace_by_default(make_clip) -> None:
    clip = str(make_clip())
    for url, asked, policy in [
        (clip, None, "block"),
        (clip, "latest", "latest"),
        ("test://64x48@10", None, "latest"),
        ("test://64x48@10", "block", "block"),
    ]:
        with create_source(SourceConfig(url=url, policy=asked)) as source:
            assert source.policy == policy


def test_a_pace_follows_the_wall_clock_from_its_first_frame() -> None:
    pace = Pace(threading.Event())
    began_s = time.monotonic()
    pace.wait(100.0)
    pace.wait(100.2)
    pace.wait(100.1)
    assert 0.2 <= time.monotonic() - began_s < 30.0


def test_a_stopped_pace_does_not_wait() -> None:
    stopping = threading.Event()
    pace = Pace(stopping)
    pace.wait(0.0)
    threading.Timer(0.05, stopping.set).start()
    began_s = time.monotonic()
    pace.wait(60.0)
    assert time.monotonic() - began_s < 30.0
