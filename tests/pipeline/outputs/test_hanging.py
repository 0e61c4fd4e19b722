"""A write that hangs: distinguished from a slow one, and abandoned when the run stops."""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import pytest
from witnesses import Log, wait_until

from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.outputs.hanging import HANGS_AFTER_S, SLOW_AFTER_S, HangWatch
from maskcast.pipeline.pipeline import Pipeline


@pytest.fixture
def full_pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Make a named pipe of 4 kB that is not read; yield its path and its reading end."""
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    yield path, reader
    os.close(reader)


@pytest.mark.skipif(not Path("/proc/self/syscall").exists(), reason="the kernel shows no calls")
def test_a_full_pipe_hangs_and_a_lock_does_not(full_pipe: tuple[Path, int]) -> None:
    path, reader = full_pipe
    writer, now_s = os.open(path, os.O_WRONLY), 0.0
    lock = threading.Lock()
    lock.acquire()
    threads = [
        threading.Thread(target=os.write, args=(writer, bytes(10_000))),
        threading.Thread(target=lock.acquire),
    ]
    for thread in threads:
        thread.start()
    watches = [HangWatch(thread, lambda: now_s) for thread in threads]
    call = object()
    wait_until(lambda: is_full(reader) and all(map(waits, threads)))
    assert [watch.hangs(call) for watch in watches] == [False, False]
    now_s += HANGS_AFTER_S
    assert [watch.hangs(None) for watch in watches] == [False, False]
    assert [watch.hangs(call) for watch in watches] == [False, False]
    now_s += HANGS_AFTER_S
    assert [watch.hangs(call) for watch in watches] == [True, False]
    assert not watches[0].hangs(object())
    while threads[0].is_alive():
        with suppress(BlockingIOError):  # the thread is not at its next write yet
            os.read(reader, 4096)
    lock.release()
    for thread in threads:
        thread.join()
    os.close(writer)


def is_full(reader: int) -> bool:
    """Return whether the pipe holds 4 kB: its writer has come to the write that hangs."""
    return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder) == 4096


def waits(thread: threading.Thread) -> bool:
    """Return whether a thread waits in a system call."""
    return not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("run")


def test_where_the_kernel_shows_no_calls_only_time_counts() -> None:
    now_s = 0.0
    watch, call = HangWatch(threading.Thread(), lambda: now_s), object()
    assert not watch.hangs(call)
    now_s += SLOW_AFTER_S - 0.1
    assert not watch.hangs(call)
    now_s += 0.1
    assert watch.hangs(call)


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_a_run_that_is_stopped_ends_although_a_write_hangs_and_finishes_the_other_file(
    policy: str, full_pipe: tuple[Path, int], timed_engine, tmp_path: Path, caplog
) -> None:
    path, reader = full_pipe
    raw: dict[str, Any] = {
        "sources": [{"url": "test://64x48@50", "policy": policy}],
        "publish": {"endpoint": f"ipc://{tmp_path}/messages"},
        "outputs": {"save": str(tmp_path / "out.mp4"), "jsonl": str(path)},
    }
    pipeline = Pipeline(make_config(raw), timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().at_work_s.get("record", 0.0) > 1.5)
    pipeline.stop()
    assert pipeline.wait(60)
    pipeline.join()
    shown = [r.fields for r in caplog.records if r.getMessage() == "recording_abandoned"]
    assert [values["output"] for values in shown] == ["jsonl"]
    assert "hung" in pipeline.stats().outputs["jsonl"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration
        assert list(container.decode(video=0))
    (record,) = (thread for thread in threading.enumerate() if thread.name == "record")
    while record.is_alive():  # it continues once the pipe is read, and closes only that
        with suppress(BlockingIOError):
            os.read(reader, 1 << 16)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["out.mp4"]


def test_a_slow_output_is_waited_for(timed_engine, make_clip, monkeypatch) -> None:
    class Slow(Log):
        gate = threading.Event()

        def write(self, *arguments: Any) -> None:
            assert self.gate.wait(60)
            super().write(*arguments)

    slow = Slow()
    config = make_config({"sources": [{"url": str(make_clip(frames=3))}], "publish": None})
    pipeline = Pipeline(config, timed_engine(), recorders=[slow])
    pipeline.start()
    wait_until(lambda: pipeline.stats().at_work_s.get("record", 0.0) > 0.1)
    pipeline.stop()
    assert not pipeline.wait(3 * HANGS_AFTER_S)
    slow.gate.set()
    assert pipeline.wait(60)
    assert slow.indices == {"clip": [0, 1, 2]}
