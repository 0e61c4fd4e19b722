from __future__ import annotations

import logging
from typing import Any

import numpy as np
import openvino as ov
import pytest

from maskcast.engines.bundle import Bundle
from maskcast.engines.image import NetworkImage
from maskcast.engines.openvino import streams
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.engines.openvino.operators import read_graph
from maskcast.engines.openvino.streams import CompiledShape, Models, Stream, compile_shape

SIZE = (96, 160)


@pytest.fixture(scope="module")
def models(unthresholded_bundle: Bundle) -> Models:
    assert unthresholded_bundle.segmenter is not None
    detector, segmenter = map(
        read_graph, (unthresholded_bundle.detector, unthresholded_bundle.segmenter)
    )
    return Models(detector, segmenter, "f32")


def compile_here(models: Models, count: int = 2) -> CompiledShape:
    return compile_shape(ov.Core(), models, SIZE, streams=count, threads=1, in_flight=2)


class WrongStreams:
    """Makes the n-th stream that is compiled give wrong results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: str, *numbers: int) -> None:
        self.made = 0
        init, detect = Stream.__init__, Stream.detect
        segment = Stream.segment_exactly

        def make(stream: Any, *arguments: Any) -> None:
            init(stream, *arguments)
            stream.is_wrong = self.made in numbers
            self.made += 1

        def detect_wrongly(stream: Any, *arguments: Any) -> Any:
            found: dict[str, Any] = detect(stream, *arguments)
            if stream.is_wrong and output == "features":
                arguments[2].data[0] = np.nan
            elif stream.is_wrong and output in found:
                found[output] = found[output] + 10
            return found

        def segment_wrongly(stream: Any, *arguments: Any) -> Any:
            masks = segment(stream, *arguments).copy()
            if stream.is_wrong and output == f"masks of {len(masks)}":
                masks[-1] += 0.1
            return masks

        monkeypatch.setattr(Stream, "__init__", make)
        monkeypatch.setattr(Stream, "detect", detect_wrongly)
        monkeypatch.setattr(Stream, "segment_exactly", segment_wrongly)


@pytest.mark.parametrize(
    "output", ["boxes", "scores", "labels", "features", "masks of 32", "masks of 1"]
)
def test_a_stream_with_a_wrong_output_is_compiled_again(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, output: str
) -> None:
    wrong = WrongStreams(monkeypatch, output, 1)
    with caplog.at_level(logging.ERROR):
        compiled = compile_here(models)
    assert wrong.made == 4
    assert not any(stream.is_wrong for stream in compiled.streams)
    (record,) = caplog.records
    assert record.getMessage() == "streams_disagree"
    assert record.fields["output"] == output


def test_a_single_stream_is_compared_with_another(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = WrongStreams(monkeypatch, "boxes", 0)
    compiled = compile_here(models, 1)
    assert wrong.made == 4
    assert len(compiled.streams) == 1
    assert not compiled.streams[0].is_wrong


def test_an_engine_whose_streams_always_disagree_fails(
    unthresholded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    WrongStreams(monkeypatch, "scores", 0, 2, 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    engine = OpenVinoEngine(unthresholded_bundle, "throughput")
    image = NetworkImage(np.zeros((*SIZE, 3), np.uint8), SIZE, SIZE)
    with pytest.raises(RuntimeError, match=r"different results, 3 times; use mode latency"):
        engine.detect([image], 0.5)
    engine.close()


def test_no_stream_runs_before_all_are_compiled(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    init, infer = streams.Graph.__init__, streams.Request.infer

    def compile_graph(*arguments: Any) -> None:
        init(*arguments)
        order.append("compiled")

    def run(request: Any) -> None:
        order.append("ran")
        infer(request)

    monkeypatch.setattr(streams.Graph, "__init__", compile_graph)
    monkeypatch.setattr(streams.Request, "infer", run)
    compile_here(models)
    assert order == ["compiled"] * 14 + ["ran"] * 14
