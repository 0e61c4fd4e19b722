"""How a pipeline ends: at the end of its sources, when stopped, and after errors."""

import os
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest
from witnesses import Listener, Log, configured, wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline import pipeline as module
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.configuration.config_file import override
from maskcast.pipeline.control.server import ControlServer
from maskcast.pipeline.monitor.server import MetricsServer
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stages.chain import StageChain
from maskcast.pipeline.stages.decoders import Decoders


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """A file that is not a video."""
    path = tmp_path / "text.mp4"
    path.write_text("this is no video\n" * 100)
    return path


@pytest.mark.parametrize("where", ["detect", "segment"])
def test_an_error_of_the_engine_is_raised_with_its_traceback(timed_engine, where: str) -> None:
    engine, log = timed_engine(0.002), Log()
    engine.fails_at = {where: 5}
    pipeline = Pipeline(configured("test://64x48@200"), engine, recorders=[log])
    with pytest.raises(ZeroDivisionError, match=f"{where} went wrong") as caught:
        pipeline.run()
    assert "_fail" in "".join(traceback.format_exception(caught.value))
    assert engine.held == 0
    assert log.closed == 1
    assert pipeline.stats().sources[0].ended == "failed"


def test_an_error_of_a_recorder_is_raised_and_the_others_are_closed(
    make_clip, timed_engine
) -> None:
    def fail(frame, instances, published) -> None:
        raise ZeroDivisionError("no space")

    log = Log()
    pipeline = Pipeline(configured(make_clip()), timed_engine(), recorders=[log], on_frame=fail)
    with pytest.raises(ZeroDivisionError, match="no space"):
        pipeline.run()
    assert log.closed == 1


def test_a_pipeline_leaves_no_thread_behind(make_clip, timed_engine) -> None:
    before = set(threading.enumerate())
    Pipeline(configured(make_clip(), "test://64x48@50"), timed_engine(), limit=5).run()
    assert set(threading.enumerate()) <= before


def test_a_run_ends_although_stopping_its_sources_fails(make_clip, timed_engine) -> None:
    class Failing:
        def published(self, frame, seq) -> None:
            pass

        def dropped(self, frame, stage, reason) -> None:
            raise ZeroDivisionError("witness")

    before = set(threading.enumerate())
    clips = [make_clip(f"{name}.mp4", frames=200) for name in "abc"]  # their inboxes are full
    config = configured(*clips, "test://64x48@50")
    pipeline = Pipeline(config, timed_engine(0.05), witness=Failing())
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 2)
    pipeline.stop()
    assert pipeline.wait(60)
    with pytest.raises(ZeroDivisionError, match="witness"):
        pipeline.join()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_an_engine_that_was_given_is_left_open(make_clip, timed_engine) -> None:
    engine = timed_engine()
    Pipeline(configured(make_clip()), engine).run()
    assert not engine.closed


@pytest.mark.parametrize(
    ("sources", "publish", "message"),
    [
        (["test://64x48@50", "gone.mp4"], None, r"gone\.mp4: no such file"),
        (["rtsp://127.0.0.1:99999/cam"], None, "malformed URL"),
        (["test://64x48@50"], {"endpoint": "tcp:/5555"}, "invalid endpoint"),
    ],
)
def test_what_is_certainly_wrong_is_an_error_before_the_model_is_loaded(
    sources: list[str], publish: dict[str, str] | None, message: str, monkeypatch
) -> None:
    monkeypatch.setattr(module, "load_engine_for", lambda *_: pytest.fail("it is loaded"))
    with pytest.raises(InputError, match=message):
        Pipeline(configured(*sources, publish=publish)).run()


def test_an_unreadable_file_alone_is_an_error_at_once(timed_engine, unreadable, tmp_path) -> None:
    publish = {"endpoint": f"ipc://{tmp_path}/socket", "wait_subscribers": 1}
    with pytest.raises(InputError, match=r"text\.mp4"):
        Pipeline(configured(unreadable, publish=publish), timed_engine()).run()


@pytest.mark.parametrize("second", ["text.mp4", {"url": "gone.mp4", "required": False}])
def test_an_unreadable_file_is_an_error_when_the_other_sources_have_ended(
    second, make_clip, timed_engine, unreadable, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(unreadable.parent)
    pipeline = Pipeline(configured(make_clip(frames=40), second), timed_engine(0.02))
    with pytest.raises(InputError, match=r"text\.mp4: not a video|gone\.mp4: no such file"):
        pipeline.run()
    clip, other = pipeline.stats().sources
    assert (clip.processed, clip.ended) == (40, "end of stream")
    assert other.ended is not None
    assert [record.levelname for record in caplog.records if record.msg == "source_unreadable"] == [
        "ERROR"
    ]


def test_a_pipeline_that_is_stopped_has_no_error_of_an_unreadable_file(
    timed_engine, unreadable
) -> None:
    pipeline = Pipeline(configured("test://64x48@50", unreadable), timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[1].ended)
    wait_until(lambda: pipeline.stats().processed > 5)
    pipeline.stop()
    pipeline.join()


def test_a_read_that_hangs_does_not_delay_the_end(timed_engine, stalling_server) -> None:
    silent = {"url": stalling_server.url, "read_timeout_s": 60.0}
    pipeline = Pipeline(configured(silent), timed_engine())
    pipeline.start()

    def has_read_all() -> bool:
        before = pipeline.stats().captured
        time.sleep(1.0)
        return before > 10 and pipeline.stats().captured == before

    wait_until(has_read_all)  # the next read hangs
    pipeline.stop()
    pipeline.join()
    assert pipeline.stats().sources[0].ended == "stopped"

    def is_reading() -> bool:
        return any(thread.name.startswith(("decode", "read")) for thread in threading.enumerate())

    assert is_reading()  # the run did not wait for it
    stalling_server.release()
    wait_until(lambda: not is_reading())


def test_stopping_publishes_the_end_and_frees_the_address(timed_engine, free_port) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    engine = timed_engine(0.2, 0.1)
    config = configured("test://64x48@30", publish={"endpoint": endpoint, "wait_subscribers": 1})
    pipeline = Pipeline(config, engine)
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 2)
    pipeline.stop()
    pipeline.join()
    listener.finish()
    assert listener.ended() == {"test": "stopped"}
    assert len(listener.frames) == pipeline.stats().processed
    assert engine.held == 0
    with socket.create_server(("127.0.0.1", free_port)):
        pass


def test_an_engine_at_work_for_long_does_not_delay_the_end_of_publishing(
    timed_engine, monkeypatch, tmp_path: Path
) -> None:
    endpoint, log = f"ipc://{tmp_path}/socket", Log()
    listener = Listener(endpoint)
    engine = timed_engine()
    config = configured("test://64x48@30", publish={"endpoint": endpoint, "wait_subscribers": 1})
    pipeline = Pipeline(config, engine, recorders=[log])
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 2)
    finish, detect = threading.Event(), engine.detect

    def detect_late(images, score):
        assert finish.wait(120)
        return detect(images, score)

    monkeypatch.setattr(engine, "detect", detect_late)
    wait_until(lambda: pipeline.stats().at_work_s.get("infer", 0.0) > 0.1)
    pipeline.stop()
    wait_until(lambda: pipeline.is_published)
    assert log.closed == 1
    listener.finish()
    assert listener.ended() == {"test": "stopped"}
    assert not pipeline.wait(0)  # join() waits for the engine, which is closed after it
    finish.set()
    pipeline.join()
    assert engine.held == 0
    (source,) = pipeline.stats().sources
    assert source.captured == source.processed + sum(source.dropped.values())


@pytest.mark.parametrize("where", ["detect", "segment", "recorder"])
def test_a_failure_ends_every_source_for_the_subscribers(
    timed_engine, tmp_path: Path, where: str
) -> None:
    def fail(frame, instances, published) -> None:
        raise ZeroDivisionError("no space")

    endpoint = f"ipc://{tmp_path}/socket"
    listener = Listener(endpoint)
    engine = timed_engine(0.002)
    engine.fails_at = {where: 5}
    urls = [{"url": "test://64x48@100", "name": name} for name in "ab"]
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    on_frame = fail if where == "recorder" else None
    with pytest.raises(ZeroDivisionError):
        Pipeline(configured(*urls, publish=publish), engine, on_frame=on_frame).run()
    listener.finish()
    assert listener.ended() == {"a": "failed", "b": "failed"}


def test_a_source_that_ended_before_the_failure_keeps_its_reason(
    timed_engine, make_clip, tmp_path: Path
) -> None:
    def fail(frame, instances, published) -> None:
        if frame.source == "live" and pipeline.stats().sources[0].ended:
            raise ZeroDivisionError("no space")

    endpoint = f"ipc://{tmp_path}/socket"
    listener = Listener(endpoint)
    urls = [
        {"url": str(make_clip()), "name": "file"},
        {"url": "test://64x48@100", "name": "live"},
    ]
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    pipeline = Pipeline(configured(*urls, publish=publish), timed_engine(), on_frame=fail)
    with pytest.raises(ZeroDivisionError):
        pipeline.run()
    listener.finish()
    assert listener.ended() == {"file": "end of stream", "live": "failed"}


def test_handing_over_publishes_no_end_so_that_another_pipeline_can_continue(
    timed_engine, free_port: int
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    config = configured(
        {"url": "test://64x48@50", "name": "cam"},
        publish={"endpoint": endpoint, "wait_subscribers": 1},
    )
    listener = Listener(endpoint)
    first = Pipeline(config, timed_engine())
    first.start()
    wait_until(lambda: len(listener.frames) > 3)
    first.hand_over()
    first.join()
    assert listener.ended() == {}
    publisher = listener.frames[-1].publisher
    second = Pipeline(config, timed_engine())
    second.start()
    wait_until(lambda: listener.frames[-1].publisher != publisher)
    second.stop()
    second.join()
    listener.finish()
    assert listener.ended() == {"cam": "stopped"}
    assert sum(frame.restarted for frame in listener.frames) == 1


def test_a_signal_handler_may_stop_the_pipeline(timed_engine) -> None:
    pipeline = Pipeline(configured("test://64x48@30"), timed_engine())
    before = signal.signal(signal.SIGUSR1, lambda number, stack: pipeline.stop())
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        pipeline.run()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pipeline.stats().sources[0].ended == "stopped"


def test_stopping_twice_or_afterwards_does_no_harm(make_clip, timed_engine) -> None:
    pipeline = Pipeline(configured(make_clip()), timed_engine(0.05))
    pipeline.start()
    pipeline.stop()
    pipeline.stop()
    pipeline.join()
    pipeline.stop()


def test_a_model_that_is_not_there_is_named_and_recorders_are_closed(make_clip) -> None:
    log = Log()
    config = override(configured(make_clip()), {"model.bundle": "/nowhere"})
    with pytest.raises(InputError, match="/nowhere"):
        Pipeline(config, recorders=[log]).run()
    assert log.closed == 1


def test_an_address_in_use_ends_the_run(make_clip, timed_engine) -> None:
    log = Log()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = configured(make_clip(), publish={"endpoint": endpoint})
        with pytest.raises(InputError, match="in use"):
            Pipeline(config, timed_engine(), recorders=[log]).run()
    assert log.closed == 1


def test_a_run_that_fails_before_its_sources_begin_still_ends(
    make_clip, timed_engine, monkeypatch
) -> None:
    begin = Decoders.start

    def begin_late(sources: Decoders) -> None:
        time.sleep(0.5)
        begin(sources)

    monkeypatch.setattr(Decoders, "start", begin_late)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = configured(make_clip(), publish={"endpoint": endpoint})
        with pytest.raises(InputError, match="in use"):
            Pipeline(config, timed_engine()).run()


def test_joining_a_pipeline_that_was_never_started_is_an_error(make_clip, timed_engine) -> None:
    pipeline = Pipeline(configured(make_clip()), timed_engine())
    for wait in (pipeline.join, pipeline.wait):
        with pytest.raises(RuntimeError, match="not started"):
            wait()


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (Decoders, "start"),
        (Decoders, "review"),
        (Decoders, "join"),
        (ControlServer, "start"),
        (ControlServer, "close"),
        (MetricsServer, "close"),
        (StageChain, "start"),
        (StageChain, "drain"),
    ],
)
def test_an_error_of_the_supervisor_fails_the_run_and_everything_is_closed(
    timed_engine, monkeypatch, tmp_path: Path, owner: type, step: str
) -> None:
    original = getattr(owner, step)

    def fail(*arguments: object) -> None:
        original(*arguments)
        raise ZeroDivisionError(step)

    monkeypatch.setattr(owner, step, fail)
    log, before = Log(), set(threading.enumerate())
    config = override(
        configured("test://64x48@50", publish={"endpoint": f"ipc://{tmp_path}/messages"}),
        {"control": f"ipc://{tmp_path}/control", "metrics.address": "127.0.0.1:0"},
    )
    pipeline = Pipeline(config, timed_engine(), recorders=[log])
    pipeline.start()
    pipeline.add(SourceConfig(url="test://64x48@50", name="b"))
    pipeline.stop()
    with pytest.raises(ZeroDivisionError, match=step):
        pipeline.join()
    assert log.closed == 1
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert list(tmp_path.iterdir()) == []  # the sockets' files


def test_stopping_before_or_while_it_starts_ends_a_controlled_run(
    timed_engine, tmp_path: Path
) -> None:
    engine, before = timed_engine(), set(threading.enumerate())
    for number in range(30):
        config = override(configured("test://64x48@50"), {"control": f"ipc://{tmp_path}/control"})
        pipeline = Pipeline(config, engine)
        if number % 2:
            pipeline.stop()
            pipeline.start()
        else:
            starting = threading.Thread(target=pipeline.start)
            starting.start()
            pipeline.stop()
            starting.join()
        pipeline.join()
        assert pipeline.stats().sources[0].ended == "stopped"
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_closes_what_it_opened(make_clip, timed_engine, monkeypatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(StageChain, "__init__", fail)
    log, before = Log(), set(threading.enumerate())
    config = override(configured(make_clip()), {"metrics.address": "127.0.0.1:0"})
    pipeline = Pipeline(config, timed_engine(), recorders=[log])
    with pytest.raises(ZeroDivisionError):
        pipeline.start()
    assert log.closed == 1
    assert set(threading.enumerate()) <= before
