from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keyring import admit
from publishers import NAMES, frame, seen
from recordings import Background, made
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients import recording
from maskcast.pipeline.clients.recording import record
from maskcast.pipeline.clients.replay import replay
from maskcast.pipeline.clients.segments import segments
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame, StreamEvent
from maskcast.pipeline.wire.curve import new_keys
from maskcast.pipeline.wire.message import decode_header
from maskcast.pipeline.wire.recording import RawMessage, RecordingWriter, read_recording
from maskcast.pipeline.wire.server_keys import ServerKeys


def free_endpoint(tmp_path: Path, name: str = "socket") -> str:
    return f"ipc://{tmp_path}/{name}"


def publish_some(publisher: Publisher, count: int = 20, source: str = "cam1") -> None:
    publisher.event(source, "size", width=64, height=48)
    publisher.event(source, "state", state="streaming", reconnects=0)
    for index in range(count):
        publisher.publish(frame(source, index), seen(index % 3), jpeg=b"not decoded" * index)
    publisher.event(source, "zone_entered", track_id=1, label="person", zone="door")


def written(path: Path, messages: list[list[bytes]]) -> Path:
    with RecordingWriter(path) as writer:
        for number, parts in enumerate(messages):
            writer.write(RawMessage(parts, 10**18 + number * 1000), decode_header(parts)[1])
    return path


def parts_of(path: Path) -> list[list[bytes]]:
    return [parts for parts, _ in read_recording(path)]


def described(item: PublishedFrame | StreamEvent) -> tuple[Any, ...]:
    if isinstance(item, StreamEvent):
        return item.source, item.publisher, item.name, item.data, item.publish_ns
    masks = [item.instances.mask(i).tobytes() for i in range(len(item.instances))]
    kept = (item.source, item.publisher, item.seq, item.index, item.capture_ns, item.lost_before)
    return *kept, item.label_names, item.jpeg, item.instances.boxes.tobytes(), masks


def test_a_recording_yields_what_a_subscriber_received(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        endpoint = publisher.endpoint
        live = subscribe(endpoint, policy="all", events=True).open()
        with Background(lambda: record(endpoint, path)) as recorder:
            assert publisher.wait_for_subscribers(2, 60, ["cam1"])
            publish_some(publisher)
            publisher.event("cam1", "ended", reason="limit")
            received = list(live)
        live.close()
    recorded = list(subscribe(f"file:{path}", events=True))
    assert [described(item) for item in recorded] == [described(item) for item in received]
    assert recorder.result.received == 20
    frames = [item for item in recorded if isinstance(item, PublishedFrame)]
    assert all(0 <= item.age_ms < 60_000 for item in frames)
    only = list(subscribe(f"file:{path}", "other", events=True))
    assert only == []


def test_a_recorder_that_comes_late_has_the_state_of_the_sources(tmp_path: Path) -> None:
    path = tmp_path / "late.mcap"
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        publish_some(publisher, 3)
        endpoint = publisher.endpoint
        with Background(lambda: record(endpoint, path)):
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.publish(frame(index=3), seen())
            publisher.event("cam1", "ended")
    items = list(subscribe(f"file:{path}", events=True))
    names = [item.name if isinstance(item, StreamEvent) else item.index for item in items]
    assert names == ["labels", "size", "state", 3, "ended"]
    assert next(i for i in items if isinstance(i, PublishedFrame)).label_names == NAMES


messages = st.lists(
    st.tuples(
        st.sampled_from(["cam1", "door"]),
        st.sampled_from(["instances", "labels", "state", "zone_entered", "later"]),
        st.integers(0, 3),
        st.binary(max_size=40),
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=messages)
def test_what_is_replayed_and_recorded_again_is_identical(
    tmp_path_factory: pytest.TempPathFactory, choices: list[tuple[str, str, int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    first = written(folder / "first.mcap", made(choices))
    endpoint = free_endpoint(folder)
    with Background(lambda: replay(first, endpoint, speed="max")):
        record(endpoint, folder / "second.mcap")
    assert parts_of(folder / "second.mcap") == parts_of(first) == made(choices)


def test_encrypted_messages_are_recorded_and_replayed_with_keys(tmp_path: Path) -> None:
    for name in ("server", "friend"):
        new_keys(tmp_path / name)
    (tmp_path / "clients").mkdir()
    admit(tmp_path / "friend.key", tmp_path / "clients")
    server, friend = tmp_path / "server.key_secret", tmp_path / "friend.key_secret"
    given = {"server_key": tmp_path / "server.key", "client_key": friend}
    keys = ServerKeys.read(server, tmp_path / "clients")
    first, second = tmp_path / "first.mcap", tmp_path / "second.mcap"
    with Publisher("tcp://127.0.0.1:0", NAMES, keys=keys) as publisher:
        endpoint = publisher.endpoint
        with Background(lambda: record(endpoint, first, **given)) as recorder:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publish_some(publisher)
            publisher.event("cam1", "ended", reason="limit")
    assert recorder.result.received == 20
    again = free_endpoint(tmp_path)
    allowed = {"secret_key": server, "allowed_clients": tmp_path / "clients"}
    with (
        subscribe(again, timeout_s=1) as uninvited,
        Background(lambda: replay(first, again, speed="max", **allowed)),
    ):
        record(again, second, **given)
        assert uninvited.tally.received == 0
    assert parts_of(second) == parts_of(first)


def test_a_recording_continues_through_a_restart_of_the_publisher(tmp_path: Path) -> None:
    path, endpoint = tmp_path / "restart.mcap", free_endpoint(tmp_path)
    live = subscribe(endpoint, policy="all", events=True, timeout_s=60).open()
    with Background(lambda: record(endpoint, path)) as recorder:
        for count in (5, 7):  # the first publisher ends without an event
            with Publisher(endpoint, NAMES) as publisher:
                assert publisher.wait_for_subscribers(2, 60, ["cam1"])
                publish_some(publisher, count)
                if count == 7:
                    publisher.event("cam1", "ended", reason="limit")
        received = list(live)
    live.close()
    assert recorder.result.received == 12
    recorded = list(subscribe(f"file:{path}", events=True))
    assert [described(item) for item in recorded] == [described(item) for item in received]
    frames = [item for item in recorded if isinstance(item, PublishedFrame)]
    assert [item.index for item in frames] == [*range(5), *range(7)]
    assert [item.restarted for item in frames] == [index == 5 for index in range(12)]
    assert len({item.publisher for item in frames}) == 2
    replayed, again = tmp_path / "again.mcap", free_endpoint(tmp_path, "again")
    with Background(lambda: replay(path, again, speed="max")):
        record(again, replayed)
    assert parts_of(replayed) == parts_of(path)


def test_another_mcap_reader_finds_every_message_with_its_times(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Foxglove's reader in JavaScript, which shares no code with the Python package."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    script = shutil.copy(Path(__file__).parents[2] / "reference" / "mcap_reader.mjs", folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "@mcap/core@2", "fzstd@0.1"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm packages cannot be installed: {done.stderr[-300:]}")
    path = tmp_path / "run.mcap"
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        endpoint = publisher.endpoint
        with Background(lambda: record(endpoint, path)):
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publish_some(publisher, 200)  # more than one chunk
            publisher.event("cam1", "ended", reason="limit")
    command = ["node", str(script), str(path)]
    read = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in read.stdout.splitlines()]
    messages = list(read_recording(path))
    assert len(found) == len(messages) > 200
    for printed, (parts, received_ns) in zip(found, messages, strict=True):
        header = decode_header(parts)[1]
        assert printed == {
            "topic": parts[0].decode(),
            "messageEncoding": "maskcast-v1",
            "sequence": header.seq,
            "logTime": str(received_ns),
            "publishTime": str(header.publish_ns),
            "sha256": sha256(msgspec.msgpack.encode(parts[1:])).hexdigest(),
        }


def test_a_replay_keeps_the_intervals_or_shortens_them(tmp_path: Path) -> None:
    path = tmp_path / "slow.mcap"
    with RecordingWriter(path) as writer:
        for seq, parts in enumerate(made([("cam1", "instances", 0, b"")] * 4)):
            message = RawMessage(parts, 10**18 + seq * 200_000_000)
            writer.write(message, decode_header(parts)[1])
    for speed, expected_s in ((2.0, 0.4), (1.0, 0.8)):
        endpoint = free_endpoint(tmp_path)
        began_s = time.monotonic()
        with Background(lambda e=endpoint, s=speed: replay(path, e, speed=s)):
            received = list(subscribe(endpoint, policy="all"))
        assert time.monotonic() - began_s >= expected_s
        assert [item.seq for item in received] == [0, 1, 2, 3]


def test_a_loop_is_a_restart_to_subscribers(tmp_path: Path) -> None:
    path = written(tmp_path / "short.mcap", made([("cam1", "instances", 0, b"")] * 3))
    endpoint = free_endpoint(tmp_path)
    command = [sys.executable, "-m", "maskcast", "replay", str(path), "--publish", endpoint]
    process = subprocess.Popen([*command, "--loop"], stderr=subprocess.PIPE)
    try:
        with subscribe(endpoint, policy="all", until_ended=False, timeout_s=60) as frames:
            got = [frames.receive() for _ in range(9)]
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert b"Traceback" not in errors
    assert process.returncode == 0
    assert [item.seq for item in got] == [0, 1, 2] * 3
    assert len({item.publisher for item in got}) == 3
    assert sum(item.restarted for item in got) == 2


def test_a_killed_recorder_leaves_a_readable_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "killed.mcap"
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        command = [sys.executable, "-m", "maskcast", "record", publisher.endpoint, str(path)]
        process = subprocess.Popen(command)
        try:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publish_some(publisher)
            wait_until(lambda: path.exists() and path.stat().st_size >= 8)  # its magic bytes
            wait_until(lambda: len(list(subscribe(f"file:{path}"))) == 20)
            publisher.publish(frame(index=20), seen())  # in no chunk yet, or in one
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert len(list(subscribe(f"file:{path}"))) >= 20
    assert "recording_truncated" in caplog.text


@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_file_that_was_cut_off_is_read_up_to_its_last_chunk(tmp_path: Path, cut: int) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.mcap"
    with RecordingWriter(path) as writer:
        for number, parts in enumerate(made([("cam1", "instances", 0, rng.bytes(3000))] * 5)):
            writer.write(RawMessage(parts, number), decode_header(parts)[1])
            writer.flush()
        size = path.stat().st_size
        content = path.read_bytes()[: size - cut]
    path.write_bytes(content)
    assert len(parts_of(path)) == (6 if cut < 100 else 5)  # the index, or the last of 6 chunks


def test_damage_in_the_middle_is_an_error_after_the_good_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.mcap"
    sizes = []
    with RecordingWriter(path) as writer:
        for number, parts in enumerate(made([("cam1", "instances", 0, rng.bytes(3000))] * 5)):
            writer.write(RawMessage(parts, number), decode_header(parts)[1])
            writer.flush()
            sizes.append(path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[sizes[1] + 1500] ^= 0xFF
    path.write_bytes(content)
    frames = []
    with pytest.raises(InputError, match=r"damaged\.mcap: damaged before byte"):
        frames.extend(item.seq for item in subscribe(f"file:{path}"))
    assert frames == [0, 1]
    with pytest.raises(InputError, match="damaged"):
        replay(path, free_endpoint(tmp_path))


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.mcap"
    text.write_text("these are notes, and no recording at all")
    with pytest.raises(InputError, match="not a recording"):
        list(subscribe(f"file:{text}"))
    text.write_bytes(b"")
    with pytest.raises(InputError, match="not a recording"):
        list(subscribe(f"file:{text}"))
    with pytest.raises(InputError, match="no such file"):
        subscribe(f"file:{tmp_path}/missing.mcap")
    with pytest.raises(InputError, match="cannot be mixed"):
        subscribe(["tcp://127.0.0.1:5555", f"file:{text}"])
    with pytest.raises(InputError, match="exists"):
        record("tcp://127.0.0.1:9", text)
    with pytest.raises(InputError, match=r"ends in \.mcap"):
        record("tcp://127.0.0.1:9", tmp_path / "a.mp4")
    with pytest.raises(InputError, match="only segments and clips can be deleted"):
        record("tcp://127.0.0.1:9", tmp_path / "a.mcap", disk_bytes=1e9)


def test_segments_begin_with_the_state_and_the_oldest_goes_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, limit = tmp_path / "cam.mcap", 40_000
    other = tmp_path / "cam-notes.mcap"
    other.write_bytes(bytes(100_000))  # not a segment: never deleted
    rng = np.random.default_rng(0)
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        endpoint = publisher.endpoint
        with Background(
            lambda: record(endpoint, path, segment_bytes=10_000, disk_bytes=limit)
        ) as recorder:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.event("cam1", "state", state="streaming", reconnects=0)
            for index in range(40):
                publisher.publish(frame(index=index), seen(), jpeg=rng.bytes(3000))
            publisher.event("cam1", "ended")
    assert recorder.result.received == 40
    assert sum(file.stat().st_size for file in segments(path)) <= limit
    assert "recording_deleted" in caplog.text
    assert other.exists()
    assert not path.exists()
    kept = segments(path)
    assert len(kept) > 1
    for file in kept:
        items = list(subscribe(f"file:{file}", events=True))
        events = [item.name for item in items[:2] if isinstance(item, StreamEvent)]
        assert events == ["labels", "state"]
        assert all(i.label_names == NAMES for i in items if isinstance(i, PublishedFrame))
    several = list(subscribe([f"file:{file}" for file in kept]))
    indices = [item.index for item in several]
    assert indices == list(range(indices[0], 40))
    assert indices[0] > 0


def test_a_disk_that_is_full_from_the_start_is_reported_in_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code = """
import io, pathlib, sys
from maskcast.pipeline.wire import recording
opened = pathlib.Path.open
def full(self, mode="r", *rest, **more):
    return opened(pathlib.Path("/dev/full") if mode == "xb" else self, mode.replace("x", "w"))
pathlib.Path.open = full
import maskcast
try:
    maskcast.record("tcp://127.0.0.1:9", "x.mcap")
except maskcast.InputError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "No space left on device" in done.stdout, done.stderr


FULL = """
import resource, signal, sys
from maskcast.pipeline.clients import recording
from maskcast.pipeline.log import configure

configure()
recording.RETRY_S = 0.2
limits = {signal.SIGUSR1: resource.RLIM_INFINITY, signal.SIGUSR2: 20_000}
for number, size in limits.items():
    signal.signal(number, lambda n, _: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limits[n], resource.RLIM_INFINITY)))
signal.raise_signal(signal.SIGUSR2)
clips = {"on": ["zone_entered"], "after_s": 60}
kinds = {"plain": {}, "segments": {"segment_s": 3600}, "clips": clips}
try:
    print(recording.record(sys.argv[1], sys.argv[2], **kinds[sys.argv[3]]).received)
except recording.InputError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("kind", ["plain", "segments", "clips"])
@pytest.mark.parametrize("is_freed", [True, False])
def test_a_recording_pauses_while_the_disk_is_full_and_continues_in_another_file(
    kind: str, is_freed: bool, tmp_path: Path
) -> None:
    if kind != "plain" and not is_freed:
        pytest.skip("the end is the same for all kinds")
    path, rng = tmp_path / "cam.mcap", np.random.default_rng(0)
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        command = [sys.executable, "-c", FULL, publisher.endpoint, str(path), kind]
        recorder = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert recorder.stderr is not None
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.event("cam1", "state", state="streaming", reconnects=0)
            publisher.event("cam1", "zone_entered", track_id=1, label="person", zone="door")
            publisher.publish(frame(index=0), seen(), jpeg=rng.bytes(3000))
            wait_until(lambda: any(file.stat().st_size > 3000 for file in tmp_path.iterdir()))
            lines: list[str] = []
            index = 1

            def publish_until(event: str) -> None:
                nonlocal index
                reading = Background(lambda: lines.append(recorder.stderr.readline()))
                with reading:
                    before = len(lines)
                    while len(lines) == before:
                        publisher.publish(frame(index=index), seen(), jpeg=rng.bytes(3000))
                        if kind == "clips":
                            publisher.event("cam1", "zone_entered", track_id=1)
                        index += 1
                        time.sleep(0.02)
                assert event in lines[-1]

            publish_until("event=recording_failed")
            assert "File too large" in lines[-1]
            if is_freed:
                recorder.send_signal(signal.SIGUSR1)
                publish_until("event=recording_resumed")
                for _ in range(5):
                    publisher.publish(frame(index=index), seen())
                    index += 1
            publisher.event("cam1", "ended", reason="limit")
            _, errors = recorder.communicate(timeout=60)
        finally:
            recorder.kill()
            recorder.communicate()
    first, *others = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    if is_freed:
        assert (recorder.returncode, errors) == (0, "")
        (second,) = others
        assert second.name.startswith("cam-2")
        missing = int(lines[-1].partition("missing=")[2].split()[0])
    else:
        assert (recorder.returncode, others) == (1, [])
        assert "cam.mcap: cannot be written: File too large; " in errors
        assert len(errors.splitlines()) == 1
    files = [list(subscribe(f"file:{f}", events=True)) for f in (first, *others)]
    frames = [[i.index for i in items if isinstance(i, PublishedFrame)] for items in files]
    assert frames[0]
    assert frames[0] == list(range(len(frames[0])))
    if is_freed:
        assert frames[1] == list(range(frames[1][0], index))
        names = [item.name for item in files[1][:2] if isinstance(item, StreamEvent)]
        assert names == ["labels", "state"]
        if kind != "clips":
            assert missing == frames[1][0] - len(frames[0])


def test_a_recording_continues_when_its_folder_comes_back(
    tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(recording, "RETRY_S", 0.1)
    folder = tmp_path / "disk"
    folder.mkdir()
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        endpoint = publisher.endpoint
        with Background(lambda: record(endpoint, folder / "cam.mcap")):
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publish_some(publisher)
            wait_until(lambda: (folder / "cam.mcap").stat().st_size > 500)
            shutil.rmtree(folder)
            wait_until(lambda: publish_some(publisher, 1) or "recording_failed" in caplog.messages)
            folder.mkdir()
            wait_until(lambda: publish_some(publisher, 1) or "recording_resumed" in caplog.messages)
            publisher.event("cam1", "ended", reason="limit")
    (file,) = folder.iterdir()
    assert any(isinstance(item, PublishedFrame) for item in subscribe(f"file:{file}", events=True))
    shown = [r.fields["reason"] for r in caplog.records if r.getMessage() == "recording_failed"]
    assert len(shown) == len(set(shown))
