"""``maskcast cluster`` as a user runs it, on Ray nodes of this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from witnesses import wait_until

import maskcast
from maskcast.pipeline.control.client import ControlClient
from maskcast.pipeline.control.messages import Placement, SourceReport
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import PublishedFrame, StreamEvent

pytest.importorskip("ray")

ROOT = Path(maskcast.__file__).parents[1]
COMMAND = [sys.executable, "-m", "maskcast"]
TIMEOUT_S = 180.0
"""Much longer than any step takes on an idle machine."""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "160",
    "RAY_AUTH_MODE": "disabled",  # everything is on loopback
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds Ray to loopback
}


def processes_in(folder: Path) -> dict[int, str]:
    """Return the processes whose working directory is a folder, with their commands.

    This finds all that a test has started there: Ray's processes overwrite their environment and
    leave their parents, but not the folder.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is a zombie
            if (process / "cwd").readlink() == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield the working directory of a test's processes; none may be left at the end."""
    folder = tmp_path / "here"
    folder.mkdir()
    yield folder
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not processes_in(folder), 90)
    left = processes_in(folder)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def listening_addresses(pids: Iterable[int]) -> list[str]:
    """Return the IP addresses that processes listen on, once for each TCP socket."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                sockets.add(str(file.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])  # of 32 bits each
                address = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                given = ipaddress.ip_address(address)
                found.append(str(getattr(given, "ipv4_mapped", None) or given))
    return found


class Nodes:
    """Ray nodes with one CPU each: ``benchmarks.ray_nodes`` as a process."""

    def __init__(self, folder: Path, *client_port: int) -> None:
        self._log = folder / "nodes.log"
        with self._log.open("w") as log:
            self._start(folder, log, client_port)
        self.address = self._answer()

    def _start(self, folder: Path, log: TextIO, client_port: tuple[int, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ray_nodes", *map(str, client_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=ENVIRONMENT,
            cwd=folder,
        )

    def add(self, name: str) -> int:
        """Add a node; return its raylet's process id."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return int(self._answer())

    def close(self) -> None:
        self._process.communicate(timeout=TIMEOUT_S)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Ray prints to it too
            if line.startswith("said "):
                return line.split()[1]
        raise AssertionError(f"the nodes have ended: {self._log.read_text()[-2000:]}")


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    yield nodes
    nodes.close()


@pytest.fixture
def head(folder: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start a cluster for the address ``auto``, as ``ray start --head`` leaves it running."""
    # A short path: Ray puts sockets there.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as files:
        monkeypatch.setitem(ENVIRONMENT, "RAY_TMPDIR", files)
        try:
            for _ in range(5):  # on a busy machine, Ray gives up after 30 s
                command = [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
                    *("--port", str(free_port), "--num-cpus", "1", "--disable-usage-stats"),
                    *("--include-dashboard", "false", "--object-store-memory", str(80 << 20)),
                ]
                with (folder / "head.log").open("w") as log:
                    result = subprocess.run(
                        command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=folder, check=False
                    )
                if result.returncode == 0:
                    break
                kill_all_in(folder)
            yield
        finally:
            kill_all_in(folder)


def kill_all_in(folder: Path) -> None:
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_in(folder), TIMEOUT_S)


class Fleet:
    """A running ``maskcast cluster run``."""

    def __init__(self, folder: Path, address: str, sources: dict[str, str]) -> None:
        control = f"ipc://{folder}/control"
        self.endpoint = f"ipc://{folder}/messages"
        config = folder / "fleet.yaml"
        lines = [f"- {{name: {name}, url: '{url}'}}" for name, url in sources.items()]
        config.write_text(
            "sources:\n" + "\n".join(lines) + "\nmetrics: 127.0.0.1:0\n"
            f"cluster: {{gateway: '{self.endpoint}', cpus_per_source: 0.5}}\n"
        )
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [
                *(*COMMAND, "cluster", "--control", control, "run", "--config", str(config)),
                *("--address", address, "--log-level", "info", "--log-format", "json"),
            ],
            stderr=self._log,
            env=ENVIRONMENT,
            cwd=folder,
        )
        self.client = ControlClient(control, timeout_s=TIMEOUT_S)
        self.words = ["cluster", "--control", control, "--timeout-s", str(TIMEOUT_S)]

    def command(self, *words: str, code: int = 0) -> str:
        result = subprocess.run(
            [*COMMAND, *self.words, *words],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=2 * TIMEOUT_S,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert code == 0 or len(result.stderr.splitlines()) == 1, result.stderr
        return result.stdout if code == 0 else result.stderr

    def source(self, name: str) -> SourceReport:
        return next(source for source in self.client.list() if source.name == name)

    def wait_for(self, name: str, condition: Callable[[SourceReport], bool]) -> SourceReport:
        wait_until(
            lambda: self.process.poll() is not None or condition(self.source(name)), TIMEOUT_S
        )
        assert self.process.poll() is None, self.log()
        return self.source(name)

    def has_started(self) -> bool:
        """Wait until it has started or ended; return whether it has started."""
        wait_until(
            lambda: self.process.poll() is not None or bool(self.events("control_open")), TIMEOUT_S
        )
        return self.process.poll() is None

    def wait_until_running(self, *names: str) -> None:
        for name in names:
            self.wait_for(name, is_streaming)

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def is_streaming(source: SourceReport) -> bool:
    return source.placement is Placement.RUNNING and source.processed > 0


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Fleet]]:
    started: list[Fleet] = []

    def start(address: str, **sources: str) -> Fleet:
        started.append(Fleet(folder, address, sources))
        return started[-1]

    yield start
    for fleet in started:
        fleet.close()


class Receiver:
    """A subscriber that keeps everything that it receives."""

    def __init__(self, endpoint: str) -> None:
        self.frames: dict[str, list[PublishedFrame]] = defaultdict(list)
        self.events: dict[str, list[StreamEvent]] = defaultdict(list)
        self._subscription: Any = subscribe(
            endpoint, policy="all", events=True, until_ended=False, timeout_s=600
        )
        self._thread = threading.Thread(target=self._listen, name="receiver")

    def __enter__(self) -> Receiver:
        self._subscription.open()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._subscription.close()
        self._thread.join()

    def _listen(self) -> None:
        for item in self._subscription:
            kept: Any = self.events if isinstance(item, StreamEvent) else self.frames
            kept[item.source].append(item)

    def publisher(self, name: str) -> str:
        wait_until(lambda: bool(self.frames[name]), TIMEOUT_S)
        return self.frames[name][-1].publisher

    def wait_for_more(self, name: str, count: int = 2) -> None:
        seen = len(self.frames[name])
        wait_until(lambda: len(self.frames[name]) >= seen + count, TIMEOUT_S)

    def wait_for_another_publisher(self, name: str, before: str) -> None:
        wait_until(lambda: self.publisher(name) != before, TIMEOUT_S)

    def ended(self, name: str) -> list[str]:
        return [event.data["reason"] for event in self.events[name] if event.name == "ended"]

    def check_losses(self) -> None:
        """Check that missing numbers are reported as lost and new publishers as restarts."""
        for frames in self.frames.values():
            for before, frame in itertools.pairwise(frames):
                is_same = before.publisher == frame.publisher
                assert frame.restarted is not is_same
                if is_same:
                    assert frame.lost_before == frame.seq - before.seq - 1


PATTERN = "test://64x48@4"


def test_sources_survive_workers_nodes_and_the_gateway(
    nodes: Nodes, start: Callable[..., Fleet]
) -> None:
    raylet = nodes.add("second")
    fleet = start(nodes.address, door=PATTERN, yard=PATTERN)
    with Receiver(fleet.endpoint) as receiver:
        fleet.wait_until_running("door", "yard")
        first = receiver.publisher("door")
        untouched = receiver.publisher("yard")

        # A worker dies: its source is back as a new publisher, the other source is not affected.
        os.kill(fleet.source("door").pid or 0, signal.SIGKILL)
        receiver.wait_for_another_publisher("door", first)
        assert fleet.source("door").restarts == 1
        assert fleet.source("yard").restarts == 0
        assert receiver.publisher("yard") == untouched
        assert not any(frame.lost_before for frame in receiver.frames["yard"])

        # The gateway dies: the same publishers continue, and what is lost meanwhile is counted.
        gateway = fleet.client.status()[0].gateway.pid
        os.kill(gateway or 0, signal.SIGKILL)
        wait_until(lambda: fleet.client.status()[0].gateway.pid not in (None, gateway), TIMEOUT_S)
        receiver.wait_for_more("yard")
        assert receiver.publisher("yard") == untouched

        # A source moves and does not end.
        there = "second" if fleet.source("yard").node == "head" else "head"
        assert fleet.command("move", "yard", there).startswith("yard: moved, ")
        receiver.wait_for_another_publisher("yard", untouched)
        assert fleet.source("yard").node == there
        assert "is on that node already" in fleet.command("move", "yard", there, code=2)
        assert "there is no node 'third'" in fleet.command("move", "yard", "third", code=2)

        # A node dies: its sources are back on the other one.
        for name in ("door", "yard"):
            if fleet.source(name).node == "head":
                fleet.command("move", name, "second")
        before = {name: receiver.publisher(name) for name in ("door", "yard")}
        os.kill(raylet, signal.SIGKILL)
        for name, publisher in before.items():
            receiver.wait_for_another_publisher(name, publisher)
            assert fleet.source(name).node == "head"
        assert [node.name for node in fleet.client.status()[0].nodes] == ["head"]

        assert not receiver.ended("door") + receiver.ended("yard")
        assert fleet.stop() == 0, fleet.log()
        wait_until(lambda: bool(receiver.ended("door") and receiver.ended("yard")), TIMEOUT_S)
    receiver.check_losses()
    lost = {event["source"] for event in fleet.events("source_lost")}
    assert lost == {"door", "yard"}
    assert len(fleet.events("gateway_lost")) == 1


def test_sources_are_added_and_removed_and_reported_when_no_cpu_is_free(
    nodes: Nodes, start: Callable[..., Fleet]
) -> None:
    fleet = start(nodes.address, door=PATTERN)
    with Receiver(fleet.endpoint) as receiver:
        fleet.wait_until_running("door")
        assert fleet.command("add", "yard", PATTERN).startswith("yard: added, ")
        fleet.wait_until_running("yard")
        receiver.publisher("yard")
        assert "there is a source 'yard'" in fleet.command("add", "yard", PATTERN, code=2)

        # Both halves of the only CPU are taken.
        assert "needs 0.5 CPU" in fleet.command("add", "roof", PATTERN)
        assert fleet.source("roof").placement is Placement.UNPLACED
        assert "roof is unplaced: needs 0.5 CPU" in str(health(fleet, 503)["problems"])
        status = fleet.command("status")
        assert "roof: unplaced" in status
        assert "node head" in status

        # A CPU becomes free.
        assert fleet.command("remove", "yard") == "yard: removed\n"
        wait_until(lambda: bool(receiver.ended("yard")), TIMEOUT_S)
        assert receiver.ended("yard") == ["removed"]
        fleet.wait_until_running("roof")
        receiver.publisher("roof")
        assert health(fleet, 200)["healthy"]
        assert [source.name for source in fleet.client.list()] == ["door", "roof"]

        scraped = urllib.request.urlopen(f"{metrics_url(fleet)}/metrics").read().decode()
        for name in ("door", "roof"):
            sample = f'maskcast_frames_processed_total{{node="head",source="{name}"}}'
            assert sample in scraped, scraped
        assert "maskcast_gateway_publishers 2.0" in scraped
        assert fleet.stop() == 0, fleet.log()
    receiver.check_losses()
    assert not any(frame.lost_before for frames in receiver.frames.values() for frame in frames)


def test_a_source_that_kills_its_worker_repeatedly_is_set_aside(
    nodes: Nodes, start: Callable[..., Fleet]
) -> None:
    fleet = start(nodes.address, door=PATTERN)
    pids: list[int] = []
    while True:
        found = fleet.wait_for(
            "door",
            lambda source: (
                source.placement is Placement.SET_ASIDE
                or (is_streaming(source) and source.pid not in pids)
            ),
        )
        if found.placement is Placement.SET_ASIDE:
            break
        pids.append(found.pid or 0)
        os.kill(pids[-1], signal.SIGKILL)
    assert len(pids) == 5
    assert [event["level"] for event in fleet.events("source_set_aside")] == ["error"]
    assert fleet.source("door").restarts == 4
    assert "door is set aside" in str(health(fleet, 503)["problems"])

    # Removed and added, it is started again.
    with Receiver(fleet.endpoint) as receiver:
        fleet.command("remove", "door")
        wait_until(lambda: bool(receiver.ended("door")), TIMEOUT_S)
        assert receiver.ended("door") == ["removed"]
        fleet.command("add", "door", PATTERN)
        fleet.wait_until_running("door")


def test_a_cluster_elsewhere_is_used_through_ray_client(
    folder: Path, start: Callable[..., Fleet], free_port: int
) -> None:
    nodes = Nodes(folder, free_port)
    try:
        for _ in range(5):  # on a busy machine, Ray gives up starting its server for a client
            fleet = start(f"ray://127.0.0.1:{free_port}", door=PATTERN)
            if fleet.has_started():
                break
        with Receiver(fleet.endpoint) as receiver:
            fleet.wait_until_running("door")
            first = receiver.publisher("door")
            os.kill(fleet.source("door").pid or 0, signal.SIGKILL)
            receiver.wait_for_another_publisher("door", first)
            assert fleet.stop() == 0, fleet.log()
        assert "Traceback" not in fleet.log()
    finally:
        nodes.close()


def kill_raylet(folder: Path) -> None:
    """Kill a cluster's only raylet, to which the command is connected."""
    (raylet,) = (pid for pid, command in processes_in(folder).items() if "raylet/raylet" in command)
    os.kill(raylet, signal.SIGKILL)


@pytest.mark.usefixtures("head")
def test_a_cluster_of_this_machine_is_found_and_its_loss_ends_the_command(
    start: Callable[..., Fleet], folder: Path
) -> None:
    fleet = start("auto", door=PATTERN)
    with Receiver(fleet.endpoint) as receiver:
        first = receiver.publisher("door")
        os.kill(fleet.source("door").pid or 0, signal.SIGKILL)
        receiver.wait_for_another_publisher("door", first)
        gateway = fleet.client.status()[0].gateway.pid
        kill_raylet(folder)
        assert fleet.process.wait(TIMEOUT_S) == 1
    assert "maskcast: the Ray node that this command is connected to has died" in fleet.log()
    assert "Traceback" not in fleet.log()
    assert gateway not in processes_in(folder)


def test_a_local_cluster_whose_node_dies_ends_with_everything(
    start: Callable[..., Fleet], folder: Path
) -> None:
    fleet = start("local", door=PATTERN)
    fleet.wait_until_running("door")
    kill_raylet(folder)
    assert fleet.process.wait(TIMEOUT_S) == 1
    assert "maskcast: the Ray node that this command is connected to has died" in fleet.log()
    wait_until(lambda: not processes_in(folder), TIMEOUT_S)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_local_cluster_is_on_loopback_only_and_ends_with_the_command(
    start: Callable[..., Fleet], folder: Path, ending: signal.Signals
) -> None:
    fleet = start("local", door=PATTERN)
    fleet.wait_until_running("door")
    processes = processes_in(folder)
    assert len(processes) > 3
    listening = listening_addresses(processes)
    assert len(listening) > 5
    assert all(ipaddress.ip_address(address).is_loopback for address in listening), listening
    fleet.process.send_signal(ending)
    assert fleet.process.wait(TIMEOUT_S) == (0 if ending is signal.SIGTERM else -ending)
    wait_until(lambda: not processes_in(folder), TIMEOUT_S)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [test://8x8@1]", "cluster: missing"),
        ("sources: [test://8x8@1]\ncluster: {gatway: x}", "unknown key 'gatway' in cluster"),
        ("sources: [test://8x8@1]\ncluster: {gateway: x}", "invalid endpoint 'x'"),
        ("sources: [test://8x8@1]\ncluster: {}\npublish: null", "publish: null"),
        ("sources: [test://8x8@1]\ncluster: {}\noutputs: {save: a.mp4}", "outputs: not possible"),
    ],
)
def test_a_users_mistake_is_reported_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(text)
    result = subprocess.run(
        [*COMMAND, "cluster", "run", "--config", str(tmp_path / "fleet.yaml")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr


def metrics_url(fleet: Fleet) -> str:
    return str(fleet.events("metrics_served")[0]["url"])


def health(fleet: Fleet, status: int) -> dict[str, Any]:
    """Return the answer of ``/healthz`` as soon as it has this status."""
    body: dict[str, Any] = {}

    def has_status() -> bool:
        nonlocal body
        try:
            with urllib.request.urlopen(f"{metrics_url(fleet)}/healthz") as answer:
                found, body = answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found, body = error.code, json.load(error)
        time.sleep(0.2)
        return bool(found == status)

    wait_until(has_status, TIMEOUT_S)
    return body
