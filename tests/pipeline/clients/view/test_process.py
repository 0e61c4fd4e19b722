"""The view next to a run, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from studio import Scene, Studio, blobs
from witnesses import wait_until

import maskcast
from maskcast.engines.errors import InputError
from maskcast.pipeline.clients.view.process import TOKEN_VARIABLE, ViewProcess, local_endpoint

pytest.importorskip("starlette")
ROOT = Path(maskcast.__file__).parents[1]


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except OSError:  # refused, or no answer in time
        return 0


def test_it_serves_until_it_is_closed(studio: Studio) -> None:
    with ViewProcess(studio.endpoint, "127.0.0.1:0") as process:
        wait_until(lambda: status(process.url) == 200, what="the page")
        assert process.note() == f"view: {process.url}"
    assert status(process.url) == 0


def test_its_death_is_reported_and_harms_nothing(studio: Studio) -> None:
    with ViewProcess(studio.endpoint, "127.0.0.1:0") as process:
        wait_until(lambda: status(process.url) == 200, what="the page")
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: "ended unexpectedly" in process.note(), what="the note")
        studio.scenes["cam1"] = Scene(blobs([]))


def test_it_ends_with_the_process_that_started_it(studio: Studio) -> None:
    program = (
        "import sys, time\n"
        "from maskcast.pipeline.clients.view.process import ViewProcess\n"
        "print(ViewProcess(sys.argv[1], '127.0.0.1:0').url, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, studio.endpoint]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        wait_until(lambda: status(url) == 200, what="the page")
        parent.kill()
    wait_until(lambda: status(url) == 0, what="the end of the view")


def test_an_address_that_cannot_be_bound_is_reported_at_once(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^{address} is in use: .*another port for the view"):
            ViewProcess(studio.endpoint, address)
    with pytest.raises(InputError, match=r"invalid address for the view 'nowhere'"):
        ViewProcess(studio.endpoint, "nowhere")
    with pytest.raises(InputError, match=r"the view on 192\.0\.2\.1 needs a token"):
        ViewProcess(studio.endpoint, "192.0.2.1:8080")
    monkeypatch.setenv(TOKEN_VARIABLE, "correct-horse-battery")
    with pytest.raises(InputError, match=r"cannot serve the view on 192\.0\.2\.1:8080: .*; use an"):
        ViewProcess(studio.endpoint, "192.0.2.1:8080")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_none(name: str, *rest: Any) -> Any:
        return None if name == "uvicorn" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_none)
    with pytest.raises(InputError, match=r"needs uvicorn.*pip install 'maskcast\[view\]'"):
        ViewProcess("tcp://127.0.0.1:5555", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("bound", "local"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://*:5555", "tcp://127.0.0.1:5555"),
        ("tcp://0.0.0.0:5555", "tcp://127.0.0.1:5555"),
        ("tcp://[::]:5555", "tcp://[::1]:5555"),
        ("ipc:///run/maskcast.sock", "ipc:///run/maskcast.sock"),
    ],
)
def test_it_connects_to_the_endpoint_from_this_machine(bound: str, local: str) -> None:
    assert local_endpoint(bound) == local


def test_a_port_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="has no fixed port"):
        local_endpoint("tcp://127.0.0.1:*")


def test_run_with_view_sends_images_and_takes_the_view_with_it(free_port: int) -> None:
    connect = pytest.importorskip("websockets.sync.client").connect
    command = [
        *(sys.executable, "-m", "maskcast", "run", "test://320x240@10"),
        *("--publish", f"tcp://127.0.0.1:{free_port}", "--view", "--view-http", "127.0.0.1:0"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        url = run.stderr.readline().removeprefix("view: ").strip()
        wait_until(lambda: status(url) == 200, what="the page")
        with connect(url.replace("http:", "ws:") + "stream", max_size=None) as socket_:
            socket_.send("")
            while isinstance(message := socket_.recv(timeout=200), str):
                pass
            assert b"\xff\xd8\xff" in message, "a JPEG file"
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=120)
        assert run.returncode == 0
    assert status(url) == 0
