from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskcast.engines.bundle import Bundle
from maskcast.engines.image import NetworkImage
from maskcast.engines.openvino import streams
from maskcast.engines.openvino.cache import GraphCache
from maskcast.engines.openvino.engine import OpenVinoEngine, has_bf16, openvino_core
from maskcast.engines.openvino.models import Models
from maskcast.engines.openvino.streams import CompiledShape, Stream, compile_shape

SIZE = (96, 160)

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU does not compute in bf16")


@pytest.fixture(scope="module")
def models(unthresholded_bundle: Bundle) -> Models:
    return Models(unthresholded_bundle, "f32")


NOT_STORED = GraphCache("model", None)


def compile_here(
    models: Models, count: int = 2, *, threads: int | None = 1, cache: GraphCache = NOT_STORED
) -> CompiledShape:
    return compile_shape(
        openvino_core(), models, SIZE, streams=count, threads=threads, in_flight=2, cache=cache
    )


class WrongStreams:
    """Makes one output wrong in the streams of the given numbers, counted as they are compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: str, *numbers: int) -> None:
        self.made = 0
        init, detect = Stream.__init__, Stream.detect
        run = Stream.run_exactly

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

        def run_wrongly(stream: Any, name: str, *arguments: Any) -> Any:
            found = run(stream, name, *arguments).copy()
            if stream.is_wrong and output == f"{name} of {len(found)}":
                found[-1] += 0.1 * np.abs(found).max()
            return found

        monkeypatch.setattr(Stream, "__init__", make)
        monkeypatch.setattr(Stream, "detect", detect_wrongly)
        monkeypatch.setattr(Stream, "run_exactly", run_wrongly)


@pytest.mark.parametrize(
    "output", ["boxes", "scores", "labels", "features", "masks of 8", "masks of 1"]
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


def test_detecting_copies_no_features(models: Models) -> None:
    compiled = compile_here(models, 1, threads=None)
    features = compiled.features.get()
    pixels = np.zeros((*SIZE, 3), np.uint8)
    tracemalloc.start()
    try:
        compiled.streams[0].detect(pixels, SIZE, features)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < features.byte_size / 4


def test_wrong_heatmaps_are_found_and_right_ones_stored(
    posing_bundle: Bundle,
    cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[tuple[str, Any]]],
) -> None:
    monkeypatch.setattr(streams, "BOXES_AT_ONCE", (8, 1))
    models = Models(posing_bundle, "f32", pose=True)
    wrong = WrongStreams(monkeypatch, "heatmaps of 8", 1)
    compiled = compile_here(models, cache=cache)
    assert messages() == [("streams_disagree", None), ("graphs_ready", False)]
    assert wrong.made == 4
    assert not any(stream.is_wrong for stream in compiled.streams)
    compile_here(models, cache=cache)
    assert messages() == [("graphs_ready", True)]


def test_a_single_stream_is_compared_with_another(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = WrongStreams(monkeypatch, "boxes", 0)
    compiled = compile_here(models, 1)
    assert wrong.made == 4
    assert len(compiled.streams) == 1
    assert not compiled.streams[0].is_wrong


def test_an_engine_whose_streams_always_disagree_fails(
    unthresholded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    WrongStreams(monkeypatch, "scores", 0, 2, 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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
    assert order == ["compiled"] * 8 + ["ran"] * 8


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache("model", tmp_path / "graphs")


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, Any]]]:
    """Return the events since the last call, each with whether the graphs came from the cache."""
    caplog.set_level(logging.INFO, "maskcast")

    def read() -> list[tuple[str, Any]]:
        seen = [(one.getMessage(), one.fields.get("cached")) for one in caplog.records]
        caplog.clear()
        return seen

    return read


@pytest.mark.parametrize(("count", "threads"), [(1, None), (2, 1)])
def test_stored_graphs_are_loaded_and_compute_the_same(
    models: Models,
    cache: GraphCache,
    messages: Callable[[], list[tuple[str, Any]]],
    count: int,
    threads: int | None,
) -> None:
    compiled = compile_here(models, count, threads=threads, cache=cache)
    assert messages() == [("graphs_ready", False)]
    loaded = compile_here(models, count, threads=threads, cache=cache)
    assert messages() == [("graphs_ready", True)]
    assert len(loaded.streams) == count
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (*SIZE, 3), np.uint8)
    boxes = np.array([[10, 20, 60, 90], [5, 5, 150, 80], [70, 8, 90, 30]], np.float32)
    for one, other in zip(compiled.streams, loaded.streams, strict=True):
        features = [shape.features.get() for shape in (compiled, loaded)]
        expected, found = (
            one.detect(pixels, SIZE, features[0]),
            other.detect(pixels, SIZE, features[1]),
        )
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        masks = [
            stream.segment(table, boxes, np.ones(3, np.int32))
            for stream, table in zip((one, other), features, strict=True)
        ]
        np.testing.assert_array_equal(*masks)


def test_loaded_graphs_that_compute_something_else_are_compiled_again(
    models: Models,
    cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[tuple[str, Any]]],
) -> None:
    compile_here(models, cache=cache)
    messages()
    wrong = WrongStreams(monkeypatch, "masks of 4", 0)
    compiled = compile_here(models, cache=cache)
    assert messages() == [("stored_graphs_disagree", None), ("graphs_ready", False)]
    assert wrong.made == 4
    assert not any(stream.is_wrong for stream in compiled.streams)
    compile_here(models, cache=cache)
    assert messages() == [("graphs_ready", True)]


def test_wrong_streams_are_not_stored(
    models: Models, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    WrongStreams(monkeypatch, "scores", 0, 2, 4)
    with pytest.raises(RuntimeError, match="different results"):
        compile_here(models, cache=cache)
    assert not cache.has_entries()


@pytest.mark.parametrize("content", [b"", b"not an entry", None])
def test_a_damaged_entry_is_replaced(
    models: Models,
    cache: GraphCache,
    tmp_path: Path,
    messages: Callable[[], list[tuple[str, Any]]],
    content: bytes | None,
) -> None:
    compile_here(models, 1, threads=None, cache=cache)
    (file,) = (tmp_path / "graphs").iterdir()
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored if content is None else content)
    messages()
    compile_here(models, 1, threads=None, cache=cache)
    assert messages() == [("stored_graphs_damaged", None), ("graphs_ready", False)]
    compile_here(models, 1, threads=None, cache=cache)
    assert messages() == [("graphs_ready", True)]


def test_an_entry_that_openvino_cannot_read_is_replaced(
    models: Models, cache: GraphCache, messages: Callable[[], list[tuple[str, Any]]]
) -> None:
    compile_here(models, 1, threads=None, cache=cache)
    entry = cache.load(SIZE)
    assert entry is not None
    entry.graphs["masks of 4"] = [("f32", b"nothing that was exported")]
    cache.store(SIZE, entry)
    messages()
    compile_here(models, 1, threads=None, cache=cache)
    assert messages() == [("stored_graphs_damaged", None), ("graphs_ready", False)]


def test_a_second_engine_loads_what_the_first_compiled(
    unthresholded_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    messages: Callable[[], list[tuple[str, Any]]],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = NetworkImage(np.zeros((*SIZE, 3), np.uint8), SIZE, SIZE)
    for mode, is_cached in (("latency", False), ("latency", True), ("throughput", False)):
        engine = OpenVinoEngine(unthresholded_bundle, mode)  # type: ignore[arg-type]
        engine.detect([image], 0.5).release()
        engine.close()
        assert messages() == [("graphs_ready", is_cached)]


@needs_bf16
def test_stored_graphs_in_bf16_compute_the_same(
    unthresholded_bundle: Bundle, cache: GraphCache, messages: Callable[[], list[tuple[str, Any]]]
) -> None:
    models = Models(unthresholded_bundle, "bf16")
    compile_here(models, cache=cache)
    compile_here(models, cache=cache)
    assert messages() == [("graphs_ready", False), ("graphs_ready", True)]
