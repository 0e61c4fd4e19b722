"""The metrics for Prometheus, checked with its client's parser and, if installed, promtool."""

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from witnesses import wait_until

from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.monitor.metrics import make_registry
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.sources.state import SourceState, StateChange
from maskcast.pipeline.stats import Meter

SECRET = "hunter2"
NAMES = {
    "maskcast_line_crossings_total": "counter",
    "maskcast_zone_instances": "gauge",
    "maskcast_frames_captured_total": "counter",
    "maskcast_frames_processed_total": "counter",
    "maskcast_frames_skipped_total": "counter",
    "maskcast_frames_dropped_total": "counter",
    "maskcast_latency_seconds": "histogram",
    "maskcast_source_state": "gauge",
    "maskcast_source_decoder": "gauge",
    "maskcast_source_reconnects_total": "counter",
    "maskcast_source_corrupt_packets_total": "counter",
    "maskcast_stage_work_seconds": "histogram",
    "maskcast_stage_wait_seconds": "histogram",
    "maskcast_stage_busy_seconds_total": "counter",
    "maskcast_stage_at_work_seconds": "gauge",
    "maskcast_queue_depth": "gauge",
    "maskcast_output_failed": "gauge",
    "maskcast_subscribers": "gauge",
    "maskcast_subscribers_cut_off_total": "counter",
    "maskcast_resident_memory_peak_bytes": "gauge",
    "maskcast_engine_info": "gauge",
    "maskcast_build_info": "gauge",
}


class Exposition:
    """The samples of a scrape, by name and labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        (value,) = (
            sample.value
            for sample in self.samples
            if sample.name == name and sample.labels == labels
        )
        return value


@pytest.fixture(scope="module")
def registry(timed_engine) -> CollectorRegistry:
    """Return the registry of a pipeline that was too slow for one of its two sources."""
    config = make_config(
        {
            "sources": [{"url": "test://64x48@100", "name": "fast"}, {"url": "test://64x48@5"}],
            "publish": None,
        }
    )
    engine = timed_engine(0.02, 0.002)
    pipeline = Pipeline(config, engine)
    pipeline.start()

    def has_dropped() -> bool:
        fast, slow = pipeline.stats().sources
        return min(fast.processed, sum(fast.dropped.values())) > 10 and slow.processed > 0

    wait_until(has_dropped)
    pipeline.stop()
    pipeline.join()
    return make_registry(pipeline.stats, engine)


@pytest.fixture(scope="module")
def exposition(registry: CollectorRegistry) -> Exposition:
    return Exposition(registry)


def test_every_metric_has_its_name_and_type(exposition: Exposition) -> None:
    found = {
        # The parser removes the suffix of a counter's family.
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in exposition.families
        if family.name.startswith("maskcast_")
    }
    assert found == NAMES
    assert "process_resident_memory_bytes" in exposition.text


def test_names_end_in_base_units_and_every_metric_is_explained(exposition: Exposition) -> None:
    for family in exposition.families:
        assert family.documentation
        assert not family.name.endswith(("_ms", "_milliseconds", "_mib", "_kb", "_percent"))


def test_frames_are_captured_processed_or_dropped(exposition: Exposition) -> None:
    captured = exposition.value("maskcast_frames_captured_total", source="fast")
    processed = exposition.value("maskcast_frames_processed_total", source="fast")
    dropped = sum(
        sample.value
        for sample in exposition.samples
        if sample.name == "maskcast_frames_dropped_total" and sample.labels["source"] == "fast"
    )
    assert captured == processed + dropped
    assert min(dropped, processed) > 10


def test_a_histogram_counts_every_frame_that_was_published(exposition: Exposition) -> None:
    processed = sum(
        exposition.value("maskcast_frames_processed_total", source=source)
        for source in ("fast", "test")
    )
    for stage in ("decode", "preprocess", "infer", "masks", "publish"):
        name = "maskcast_stage_work_seconds"
        assert exposition.value(f"{name}_count", stage=stage) == processed
        assert exposition.value(f"{name}_bucket", stage=stage, le="+Inf") == processed
        buckets = [
            sample.value
            for sample in exposition.samples
            if sample.name == f"{name}_bucket" and sample.labels["stage"] == stage
        ]
        assert buckets == sorted(buckets)
    assert exposition.value("maskcast_stage_work_seconds_bucket", stage="infer", le="0.01") == 0
    mean_s = exposition.value("maskcast_stage_work_seconds_sum", stage="infer") / processed
    assert mean_s >= 0.02  # what the engine sleeps
    assert exposition.value("maskcast_latency_seconds_count", source="test") > 0


def test_a_source_is_in_one_state(exposition: Exposition) -> None:
    states = {
        sample.labels["state"]: sample.value
        for sample in exposition.samples
        if sample.name == "maskcast_source_state" and sample.labels["source"] == "test"
    }
    assert states == {state: float(state is SourceState.ENDED) for state in SourceState}


def test_the_engine_is_a_metric(exposition: Exposition) -> None:
    labels = {"model": "timed", "backend": "openvino", "precision": "fp32", "device": "test"}
    assert exposition.value("maskcast_engine_info", **labels) == 1


def test_before_the_first_frame_every_series_of_a_stage_is_zero(
    timed_engine,
) -> None:
    exposition = Exposition(make_registry(Meter(["a"]).stats, timed_engine()))
    for stage in ("preprocess", "infer", "masks", "publish"):
        assert exposition.value("maskcast_stage_wait_seconds_count", stage=stage) == 0
        assert exposition.value("maskcast_queue_depth", stage=stage) == 0
    labels = {"source": "a", "stage": "preprocess", "reason": "replaced"}
    assert exposition.value("maskcast_frames_dropped_total", **labels) == 0
    assert exposition.value("maskcast_source_state", source="a", state="connecting") == 1


def test_the_series_of_a_source_that_was_removed_vanish(timed_engine) -> None:
    meter = Meter(["a", "b"])
    registry = make_registry(meter.stats, timed_engine())
    assert 'source="b"' in Exposition(registry).text
    meter.remove("b")
    assert 'source="b"' not in Exposition(registry).text


def test_labels_hold_neither_addresses_nor_secrets(timed_engine) -> None:
    url = f"rtsp://admin:{SECRET}@127.0.0.1:9/cam"
    pipeline = Pipeline(make_config({"sources": [{"url": url}], "publish": None}), timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[0].state is SourceState.RECONNECTING)
    text = Exposition(make_registry(pipeline.stats, timed_engine())).text
    problems = " ".join(pipeline.health().problems)
    pipeline.stop()
    pipeline.wait(60)
    assert problems
    assert SECRET not in text + problems
    assert "rtsp:" not in text


def test_reconnects_are_counted(timed_engine) -> None:
    meter = Meter(["a"])
    meter.changed("a", StateChange(SourceState.STREAMING, "", 3))
    exposition = Exposition(make_registry(meter.stats, timed_engine()))
    assert exposition.value("maskcast_source_reconnects_total", source="a") == 3


def test_promtool_accepts_the_metrics(exposition: Exposition) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    result = subprocess.run(
        [promtool, "check", "metrics"], input=exposition.text, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_zones_and_lines_have_series_of_their_own(make_clip, timed_engine) -> None:
    source = {
        "url": str(make_clip("cam.mp4", frames=9)),
        "zones": [{"name": "all", "polygon": [[0, 0], [1, 0], [1, 1], [0, 1]]}],
        "lines": [{"name": "gate", "points": [[0.5, 0], [0.5, 1]]}],
    }
    engine = timed_engine()
    pipeline = Pipeline(make_config({"sources": [source], "publish": None}), engine)
    pipeline.run()
    found = Exposition(make_registry(pipeline.stats, engine))
    assert found.value("maskcast_zone_instances", source="cam", zone="all") == 1
    crossings = "maskcast_line_crossings_total"
    for direction in ("forward", "backward"):
        labels = {"source": "cam", "line": "gate", "direction": direction}
        assert found.value(crossings, **labels) == 0
