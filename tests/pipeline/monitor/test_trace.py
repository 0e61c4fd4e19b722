"""Traces, checked against the JSON format that Perfetto's importer reads."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.frame import STAGES
from maskcast.pipeline.monitor.trace import Trace, trace_events, write_trace
from maskcast.pipeline.pipeline import Pipeline

PHASES = {"M", "X", "i", "C", "s", "t", "f"}


class Log:
    def write(self, *_: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def trace(timed_engine) -> Trace:
    """Trace two sources, one of them too fast, and an engine that takes batches of two."""
    trace = Trace()
    config = make_config(
        {
            "sources": [
                {"url": "test://64x48@100", "name": "fast"},
                {"url": "test://64x48@20", "name": "slow", "every_nth": 2},
            ],
            "publish": None,
        }
    )
    engine = timed_engine(0.02, 0.005, max_batch=2)
    Pipeline(config, engine, limit=30, recorders=[Log()], witness=trace).run()
    return trace


@pytest.fixture(scope="module")
def events(trace: Trace, tmp_path_factory) -> list[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(path, trace.passages)
    document = json.loads(path.read_bytes())
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def test_every_event_has_the_fields_of_its_phase(events: list[dict[str, Any]]) -> None:
    assert {event["ph"] for event in events} == PHASES
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] != "M":
            assert isinstance(event["ts"], (int, float))
            assert event["ts"] >= 0
        if event["ph"] in "Xistf":
            assert isinstance(event["tid"], int)
            assert isinstance(event["cat"], str)
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                assert {"source", "index"} <= set(event["args"])
            case "C":
                assert all(isinstance(value, int) for value in event["args"].values())
            case "i":
                assert event["s"] == "t"
            case "s" | "t" | "f":
                assert isinstance(event["id"], int)
                assert event["bp"] == "e"


def test_every_stage_thread_is_a_track_in_the_order_of_the_stages(
    events: list[dict[str, Any]],
) -> None:
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    shown = [names[thread] for thread in sorted(names, key=order.__getitem__)]
    assert set(shown[:2]) == {"decode fast", "decode slow"}
    assert shown[2:] == ["preprocess", "infer", "masks", "publish", "record"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == set(names)


def test_every_published_frame_has_a_slice_in_every_stage(
    trace: Trace, events: list[dict[str, Any]]
) -> None:
    slices: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["args"]["source"], event["args"]["index"]].append(event)
    published = [passage for passage in trace.passages if passage.drop is None]
    assert len(published) > 5
    for passage in published:
        found = slices[passage.source, passage.index]
        assert [event["cat"] for event in found] == [*STAGES, "record"]
        assert {event["args"]["seq"] for event in found} == {passage.seq}
        infer = found[STAGES.index("infer")]
        assert infer["dur"] >= 20_000
        waited_us = infer["ts"] - (found[1]["ts"] + found[1]["dur"])
        assert infer["args"]["waited_ms"] == pytest.approx(waited_us / 1e3, abs=1e-3)


def test_slices_of_one_track_are_apart_or_identical(events: list[dict[str, Any]]) -> None:
    tracks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        for (begin, end), (next_begin, next_end) in pairwise(sorted(set(spans))):
            assert next_begin >= end - 0.01, (begin, end, next_begin, next_end)


def test_drops_are_marked_with_stage_and_reason(trace: Trace, events: list[dict[str, Any]]) -> None:
    marks = [(e["args"]["stage"], e["name"]) for e in events if e["ph"] == "i"]
    assert ("preprocess", "dropped: replaced") in marks
    assert not any("every_nth" in name for _, name in marks)  # left out on purpose, not dropped
    assert len(marks) == sum(passage.drop is not None for passage in trace.passages)


def test_queue_depths_begin_and_end_at_zero(events: list[dict[str, Any]]) -> None:
    queues: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            queues[event["name"]].append(event["args"]["frames"])
    assert set(queues) == {f"waiting for {stage}" for stage in STAGES[1:]}
    for depths in queues.values():
        assert min(depths) == 0
        assert depths[-1] == 0
    assert max(queues["waiting for preprocess"]) <= 4
    assert max(queues["waiting for infer"]) >= 1


def test_arrows_lead_a_frame_from_its_first_stage_to_its_last(events: list[dict[str, Any]]) -> None:
    flows: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event["ph"])
    for phases in flows.values():
        assert phases[0] == "s"
        assert phases[-1] == "f"
        assert set(phases[1:-1]) <= {"t"}


def test_no_frames_give_an_empty_trace() -> None:
    assert [event["ph"] for event in trace_events([])][:1] == ["M"]
    assert all(event["ph"] == "M" for event in trace_events([]))
