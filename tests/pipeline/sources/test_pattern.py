import time
from itertools import islice, pairwise

import numpy as np
import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.pattern import PatternSource, draw_pattern


def test_every_frame_of_the_pattern_differs_and_none_is_random() -> None:
    patterns = [draw_pattern(64, 48, index) for index in range(50)]
    for before, after in pairwise(patterns):
        assert (before != after).any()
    assert np.array_equal(patterns[7], draw_pattern(64, 48, 7))


def test_a_live_pattern_keeps_time() -> None:
    source = PatternSource(SourceConfig(url="test://65x47@50"))
    source.open()
    began_s = time.monotonic()
    frames = list(islice(source, 11))
    assert 0.2 <= time.monotonic() - began_s < 30.0
    assert source.live
    assert [frame.index for frame in frames] == list(range(11))
    assert [frame.pts_s for frame in frames] == [index / 50 for index in range(11)]
    assert (frames[0].decoded.width, frames[0].decoded.height) == (65, 47)


def test_a_blocking_pattern_runs_as_fast_as_it_is_read() -> None:
    source = PatternSource(SourceConfig(url="test://64x48@1", policy="block"))
    source.open()
    began_s = time.monotonic()
    assert len(list(islice(source, 20))) == 20
    assert time.monotonic() - began_s < 15.0


def test_a_stopped_pattern_ends() -> None:
    source = PatternSource(SourceConfig(url="test://64x48@10"))
    source.open()
    frames = iter(source)
    next(frames)
    source.stop()
    assert list(frames) == []


@pytest.mark.parametrize("url", ["test://", "test://64x48", "test://0x48@30", "test://64x48@0"])
def test_a_malformed_pattern_is_explained(url: str) -> None:
    with pytest.raises(InputError, match="write test://WIDTHxHEIGHT@FPS"):
        PatternSource(SourceConfig(url=url)).open()
