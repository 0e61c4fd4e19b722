from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import maskcast
from maskcast.pipeline.configuration.config import (
    Config,
    PublishConfig,
    SourceConfig,
    TracingConfig,
)
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.monitor import tracing
from maskcast.pipeline.monitor.tracing import FrameTracer
from maskcast.pipeline.pipeline import Pipeline

STAGES = {"decode", "preprocess", "infer", "masks", "publish"}


class Collector:
    """An OTLP endpoint over HTTP that keeps the spans that it receives."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.receive(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def receive(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services |= {
                one.value.string_value
                for one in resource.resource.attributes
                if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def children(self, span: Any) -> list[Any]:
        return [one for one in self.spans if one.parent_span_id == span.span_id]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, name="collector")
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def config_of(clip: Any, endpoint: str, tracing: TracingConfig | None) -> Config:
    return Config(
        sources=[SourceConfig(url=str(clip), name="cam")],
        publish=PublishConfig(endpoint=endpoint, wait_subscribers=1),
        tracing=tracing,
    )


def test_a_trace_crosses_from_the_source_to_the_subscriber(
    make_clip: Any, timed_engine: Any, tmp_path: Any, collector: Collector
) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    config = config_of(
        make_clip(frames=8), endpoint, TracingConfig(endpoint=collector.url, ratio=1)
    )
    began_ns = time.time_ns()
    theirs = TracerProvider(shutdown_on_exit=False)
    theirs.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    subscriber = theirs.get_tracer("subscriber")
    with maskcast.subscribe(endpoint, policy="all", timeout_s=60) as subscription:
        pipeline = Pipeline(config, timed_engine(0.002))
        pipeline.start()
        for frame in subscription:
            carrier = {"traceparent": frame.traceparent}
            context = TraceContextTextMapPropagator().extract(carrier)
            subscriber.start_span(f"use {frame.seq}", context).end()
        pipeline.join()
    theirs.shutdown()

    assert "maskcast" in collector.services
    frames = [span for span in collector.spans if span.name == "frame"]
    assert [attributes(span)["maskcast.seq"] for span in frames] == list(range(8))
    for number, span in enumerate(frames):
        assert span.parent_span_id == b""
        assert attributes(span)["maskcast.source"] == "cam"
        assert attributes(span)["maskcast.instances"] == 1
        inside = collector.children(span)
        assert {one.name for one in inside} == STAGES | {f"use {number}"}
        assert {one.trace_id for one in inside} == {span.trace_id}
        assert began_ns < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
        for stage in (one for one in inside if one.name in STAGES):
            assert span.start_time_unix_nano - 1e6 <= stage.start_time_unix_nano
            assert stage.start_time_unix_nano <= stage.end_time_unix_nano
            assert stage.end_time_unix_nano <= span.end_time_unix_nano + 1e6
    assert len({span.trace_id for span in frames}) == 8


def test_only_sampled_frames_are_traced(
    make_clip: Any, timed_engine: Any, tmp_path: Any, collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    draws = iter([0.3, 0.2, 0.9, 0.25, 0.0])
    monkeypatch.setattr(
        FrameTracer, "__init__", _drawing(FrameTracer.__init__, lambda: next(draws))
    )
    endpoint = f"ipc://{tmp_path}/frames"
    traced = TracingConfig(endpoint=collector.url, ratio=0.25)
    config = config_of(make_clip(frames=5), endpoint, traced)
    with maskcast.subscribe(endpoint, policy="all", timeout_s=60) as subscription:
        pipeline = Pipeline(config, timed_engine())
        pipeline.start()
        parents = [frame.traceparent for frame in subscription]
        pipeline.join()
    assert [bool(parent) for parent in parents] == [False, True, False, False, True]
    indices = [
        attributes(span)["maskcast.index"] for span in collector.spans if span.name == "frame"
    ]
    assert indices == [1, 4]


def _drawing(init: Any, draw: Any) -> Any:
    return lambda self, config: init(self, config, draw)


def test_without_tracing_there_is_no_traceparent(
    make_clip: Any, timed_engine: Any, tmp_path: Any
) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with maskcast.subscribe(endpoint, policy="all", timeout_s=60) as subscription:
        pipeline = Pipeline(config_of(make_clip(frames=3), endpoint, None), timed_engine())
        pipeline.start()
        assert [frame.traceparent for frame in subscription] == [""] * 3
        pipeline.join()


def test_a_run_ends_although_no_collector_takes_the_spans(
    make_clip: Any, timed_engine: Any, free_port: int
) -> None:
    config = Config(
        sources=[str(make_clip(frames=5))],
        publish=None,
        tracing=TracingConfig(endpoint=f"http://127.0.0.1:{free_port}", ratio=1),
    )
    pipeline = Pipeline(config, timed_engine())
    pipeline.run()
    assert pipeline.stats().processed == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"endpoint": "127.0.0.1:4318"}, "endpoint"),
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
    ],
)
def test_a_wrong_configuration_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(maskcast.InputError, match=rf"tracing\.{message}"):
        make_config({"sources": ["test://"], "tracing": given})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_PACKAGES", ("absent.package",))
    with pytest.raises(maskcast.InputError, match=r"pip install 'maskcast\[tracing\]'"):
        tracing.check_tracing_packages()
