"""The decode stage: which hardware decodes a source, and what is reported about it."""

from __future__ import annotations

import logging

import pytest

from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.ffmpeg import device_problem

pytestmark = pytest.mark.skipif(not device_problem("cuda"), reason="this machine decodes with cuda")


@pytest.fixture
def run(make_clip, timed_engine, caplog):
    """Run a clip with one value of ``decode``; return what was logged and what decoded it."""

    def run(decode: str, *, on_gpu: bool = False):
        engine = timed_engine()
        engine.decode_device = "cuda" if on_gpu else None
        clip = {"url": str(make_clip(frames=10)), "decode": decode}
        with caplog.at_level(logging.INFO, "maskcast"):
            pipeline = Pipeline(Config(sources=[clip], publish=None), engine)
            pipeline.run()
        (source,) = pipeline.stats().sources
        assert source.processed == 10
        logged = [one for one in caplog.records if one.getMessage() == "decoded_in_software"]
        return logged, source.decoder

    return run


def test_a_configured_device_that_is_absent_is_one_warning(run) -> None:
    (warning,), decoder = run("cuda")
    assert warning.levelno == logging.WARNING
    assert decoder == "software"


def test_auto_uses_the_hardware_of_the_engines_gpu(run) -> None:
    (note,), decoder = run("auto", on_gpu=True)
    assert note.levelno == logging.INFO
    assert decoder == "software"


@pytest.mark.parametrize(("decode", "on_gpu"), [("auto", False), ("software", True)])
def test_without_hardware_to_use_nothing_is_logged(run, decode, on_gpu) -> None:
    assert run(decode, on_gpu=on_gpu) == ([], "software")
