"""``maskcast run --view`` as a process, with keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from keyring import admit, new_client
from witnesses import wait_until

from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire.curve import new_keys

pytest.importorskip("starlette")
pytest.importorskip("websockets")
from tests.pipeline.clients.view.test_server import viewing
from tests.test_signals import CHEAP, ENVIRONMENT


def test_the_view_of_an_encrypted_run_has_a_key_of_its_own_and_others_need_theirs(
    tmp_path: Path,
) -> None:
    new_keys(tmp_path / "server")
    new_client(tmp_path / "clients/anna")
    new_client(tmp_path / "bert")
    endpoint = f"ipc://{tmp_path}/messages"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = ENVIRONMENT | {"TMPDIR": str(temporary)}
    command = [
        *(sys.executable, "-c", CHEAP, "TimedEngine()", "run", "test://64x48@10"),
        *("--publish", endpoint, "--view", "--view-http", "127.0.0.1:0"),
        *("--secret-key", str(tmp_path / "server.key_secret")),
        *("--allowed-clients", str(tmp_path / "clients")),
    ]

    def receives(key: Path) -> bool:
        given = {"server_key": tmp_path / "server.key", "client_key": key}
        with subscribe(endpoint, timeout_s=5, **given) as frames:
            try:
                return bool(frames.receive().source)
            except TimeoutError:
                return False

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().strip().removeprefix("view: ")
            with viewing(url) as viewer:
                wait_until(lambda: bool(viewer.frame("test")["image"]))
            wait_until(lambda: receives(tmp_path / "clients/anna.key_secret"))
            assert not receives(tmp_path / "bert.key_secret")
            admit(tmp_path / "bert.key", tmp_path / "clients")  # the folder is still watched
            wait_until(lambda: receives(tmp_path / "bert.key_secret"))
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not list(temporary.glob("maskcast-view-*"))
