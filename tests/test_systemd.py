"""The systemd unit: systemd accepts it, and its settings restart the service as intended."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from witnesses import wait_until

from maskcast import configs
from maskcast.pipeline.subscriber.subscribe import subscribe
from tests.test_signals import CHEAP, ENVIRONMENT

UNIT = Path(configs.__file__).parent / "systemd" / "maskcast@.service"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return the unit with a program that exists, since systemd checks that it does."""
    text = UNIT.read_text()
    assert text.count("/usr/local/bin/maskcast run") == 1
    path = tmp_path / UNIT.name
    path.write_text(text.replace("/usr/local/bin/maskcast run", "/bin/true run"))
    return path


def verify(unit: Path) -> str:
    instance = unit.with_name("maskcast@door.service")
    instance.write_text(unit.read_text())
    result = subprocess.run(
        ["systemd-analyze", "verify", str(instance)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in result.stderr.splitlines() if str(unit.parent) in line]
    return "\n".join(complaints) or ("" if result.returncode == 0 else result.stderr)


@needs_systemd
def test_systemd_accepts_the_unit(unit: Path) -> None:
    assert verify(unit) == ""


@needs_systemd
@pytest.mark.parametrize(
    ("right", "wrong"), [("Restart=on-failure", "Restart=perhaps"), ("RestartSec", "RestartSecs")]
)
def test_a_mistake_in_a_unit_is_detected(unit: Path, right: str, wrong: str) -> None:
    unit.write_text(unit.read_text().replace(right, wrong))
    assert verify(unit) != ""


@needs_systemd
def test_the_unit_is_hardened(unit: Path) -> None:
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", result.stdout)
    if exposure is None:
        pytest.skip(f"this systemd-analyze cannot judge files: {result.stderr.strip()[:200]}")
    assert float(exposure[1]) < 2.5  # 10 is a service without any protection


class Service:
    """Runs a unit's command and restarts it by the unit's settings, as in systemd.service(5).

    The waits before restarts are ``hurry`` times shorter than configured. The start limit counts
    the configured waits, and no other time.
    """

    def __init__(self, unit: Path, config: Path, *, hurry: float = 1.0) -> None:
        self.settings: dict[str, list[str]] = defaultdict(list)
        for line in unit.read_text().splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                self.settings[key].append(value)
        (start,) = self.settings["ExecStart"]
        start = start.replace("${CREDENTIALS_DIRECTORY}/config.yaml", str(config))
        program, *arguments = shlex.split(start)
        assert program == "/usr/local/bin/maskcast"
        self._command = [sys.executable, "-c", CHEAP, "TimedEngine()", *arguments]
        self._hurry = hurry
        self._starts: deque[float] = deque()
        self._waited_s = 0.0
        self._stopping = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.state = "activating"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.starts += 1
            self._starts.append(self._waited_s)
            self.process = subprocess.Popen(self._command, env=ENVIRONMENT)
            self.state = "active"
            code = self.process.wait()
            if self._stopping.is_set() or not self._restarts_after(code):
                self.state = "inactive" if self._is_clean(code) else "failed"
                return
            wait_s = float(self._setting("RestartSec", "0.1"))
            self._waited_s += wait_s
            if self._stopping.wait(wait_s / self._hurry):
                return
            if self._is_limited():
                self.state = "failed"
                return

    def _setting(self, key: str, default: str) -> str:
        return self.settings[key][-1] if self.settings[key] else default

    def _is_clean(self, code: int) -> bool:
        clean = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
        return code == 0 or -code in clean

    def _restarts_after(self, code: int) -> bool:
        prevented = " ".join(self.settings["RestartPreventExitStatus"]).split()
        if str(code) in prevented:
            return False
        match self._setting("Restart", "no"):
            case "always":
                return True
            case "on-failure":
                return not self._is_clean(code)
            case "on-success":
                return self._is_clean(code)
        return False

    def _is_limited(self) -> bool:
        interval_s = float(self._setting("StartLimitIntervalSec", "10"))
        burst = int(self._setting("StartLimitBurst", "5"))
        while self._starts and self._waited_s - self._starts[0] >= interval_s:
            self._starts.popleft()
        return len(self._starts) >= burst

    def cut_power(self) -> None:
        """Kill the process with SIGKILL."""
        if self.process is not None:
            self.process.kill()

    def stop(self) -> int:
        """Stop the service as ``systemctl stop`` does; return the exit code."""
        self._stopping.set()
        assert self.process is not None
        self.process.send_signal(signal.Signals[self._setting("KillSignal", "SIGTERM")])
        self._thread.join(float(self._setting("TimeoutStopSec", "90")) * 6)  # a busy machine
        assert not self._thread.is_alive()
        return self.process.returncode

    def close(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            if self.process is not None:
                self.process.kill()
            self._thread.join(0.1)


@contextmanager
def service(
    config: dict[str, Any], folder: Path, unit: Path = UNIT, **options: Any
) -> Iterator[Service]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    started = Service(unit, path, **options)
    try:
        yield started
    finally:
        started.close()


def test_after_a_power_cut_the_service_waits_for_its_camera_and_continues(
    rtsp_server, tmp_path: Path
) -> None:
    """The camera is off when the service starts, and when it starts again."""
    jsonl = tmp_path / "out.jsonl"
    config = {
        "sources": [{"url": rtsp_server.url, "name": "door"}],
        "publish": {"endpoint": f"ipc://{tmp_path}/messages"},
        "outputs": {"jsonl": str(jsonl), "append": True},
    }
    with service(config, tmp_path) as running, subscribe(f"ipc://{tmp_path}/messages") as frames:
        with pytest.raises(TimeoutError):
            frames.receive(8)
        rtsp_server.start()
        first = frames.receive(120)
        wait_until(lambda: jsonl.is_file() and jsonl.read_text().count("\n") > 3, 120)
        assert running.starts == 1

        rtsp_server.stop()
        running.cut_power()
        wait_until(lambda: running.starts == 2, 120)
        rtsp_server.start()

        def of_the_second_start() -> bool:
            return frames.receive(120).publisher != first.publisher

        wait_until(of_the_second_start, 120)
        assert running.stop() == 0
        assert (running.state, running.starts) == ("inactive", 2)
    for line in jsonl.read_text().splitlines():
        assert json.loads(line)["source"] == "door"


def test_the_service_is_restarted_however_often_it_fails(tmp_path: Path) -> None:
    config = {"sources": [{"url": "test://64x48@5"}], "publish": None}
    limited = tmp_path / UNIT.name
    limited.write_text(
        UNIT.read_text().replace("StartLimitIntervalSec=0", "StartLimitIntervalSec=60")
    )
    for unit, is_restarted in ((UNIT, True), (limited, False)):
        with service(config, tmp_path, unit, hurry=40) as running:

            def is_over() -> bool:
                running.cut_power()
                return running.starts >= 8 or running.state == "failed"

            wait_until(is_over, 120)
            assert (running.state != "failed") == is_restarted


def test_a_mistake_in_the_configuration_is_not_repeated(tmp_path: Path) -> None:
    config = {"sources": [{"url": str(tmp_path / "absent.mp4")}]}
    with service(config, tmp_path) as running:
        wait_until(lambda: running.state == "failed", 120)
        assert running.starts == 1
    repeated = tmp_path / UNIT.name
    repeated.write_text(UNIT.read_text().replace("RestartPreventExitStatus=2", ""))
    with service(config, tmp_path, repeated, hurry=40) as running:
        wait_until(lambda: running.starts == 2, 120)
