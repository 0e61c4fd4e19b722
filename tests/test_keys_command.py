"""Keys from the command line to received frames: real processes, real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from keyring import admit
from publishers import frame, seen

import maskcast
from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.wire.server_keys import ServerKeys

ROOT = Path(maskcast.__file__).parents[1]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "maskcast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    with start(folder, *arguments) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clients").mkdir()
    for name in ("server", "clients/anna"):
        assert run(tmp_path, "keys", "new", name)[0] == 0
    assert run(tmp_path, "keys", "allow", "clients/anna.key", "--sources", "*")[0] == 0
    return tmp_path


def published(folder: Path, endpoint: str) -> Any:
    curve = {
        "secret_key": str(folder / "server.key_secret"),
        "allowed_clients": str(folder / "clients"),
    }
    publish = {"endpoint": endpoint, "wait_subscribers": 1, "curve": curve}
    return make_config({"sources": [{"url": "test://64x48@25"}], "publish": publish})


def test_a_key_pair_is_made_once_and_its_files_are_named(tmp_path: Path) -> None:
    code, output, errors = run(tmp_path, "keys", "new", "server")
    assert (code, errors) == (0, "")
    assert "server.key: " in output
    assert "server.key_secret: " in output
    assert (tmp_path / "server.key_secret").stat().st_mode & 0o777 == 0o600
    secret = (tmp_path / "server.key_secret").read_bytes()
    code, output, errors = run(tmp_path, "keys", "new", "server")
    assert (code, output) == (2, "")
    assert errors == "maskcast: server.key: already exists; choose another name, or delete it\n"
    assert (tmp_path / "server.key_secret").read_bytes() == secret
    code, output, errors = run(tmp_path, "keys", "new", "absent/server")
    assert (code, output) == (2, "")
    assert errors == "maskcast: absent/server: no such folder: absent; create it first\n"
    assert not (tmp_path / "absent").exists()


def test_watch_sees_an_encrypted_pipeline_with_its_key(
    folder: Path, timed_engine: Any, free_port: int
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    keys = ("--server-key", "server.key", "--client-key", "clients/anna.key_secret")
    with start(folder, "watch", endpoint, "--json", *keys) as watching:
        pipeline = Pipeline(published(folder, endpoint), timed_engine(), limit=5)
        pipeline.run()
        output, errors = watching.communicate(timeout=120)
    assert (watching.returncode, errors) == (0, "")
    seqs = [json.loads(line)["seq"] for line in output.splitlines()]
    assert seqs == list(range(pipeline.stats().processed))
    assert seqs


def test_watch_says_why_it_sees_nothing_and_sees_everything_once_its_key_is_allowed(
    folder: Path,
) -> None:
    assert run(folder, "keys", "new", "bert")[0] == 0
    keys = ServerKeys.read(folder / "server.key_secret", folder / "clients")
    with Publisher("tcp://127.0.0.1:0", ("background",), keys=keys) as publisher:
        pair = ("--server-key", "server.key", "--client-key", "bert.key_secret")
        options = (*pair, "--json", "--timeout-s", "60", "--limit", "1")
        with start(folder, "watch", publisher.endpoint, *options) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "event=subscription_failed" in line
            assert "does not allow this client's key" in line
            admit(folder / "bert.key", folder / "clients")
            while process.poll() is None:
                publisher.publish(frame(), seen())
                time.sleep(0.02)
            assert process.stdout is not None
            assert json.loads(process.stdout.read())["source"] == "cam1"
            assert process.returncode == 0


def test_a_secret_that_others_can_read_stops_the_pipeline_and_the_watcher(
    folder: Path, timed_engine: Any, free_port: int
) -> None:
    (folder / "server.key_secret").chmod(0o644)
    (folder / "clients" / "anna.key_secret").chmod(0o644)
    endpoint = f"tcp://127.0.0.1:{free_port}"
    with pytest.raises(InputError, match="chmod 600"):
        Pipeline(published(folder, endpoint), timed_engine()).run()
    keys = ("--server-key", "server.key", "--client-key", "clients/anna.key_secret")
    code, output, errors = run(folder, "watch", endpoint, *keys)
    assert (code, output) == (2, "")
    assert errors.endswith("chmod 600 clients/anna.key_secret\n")
    assert len(errors.splitlines()) == 1


def test_keys_are_given_to_run_by_flags_both_or_neither(folder: Path) -> None:
    code, _, errors = run(folder, "run", "test://64x48@25", "--secret-key", "server.key_secret")
    assert code == 2
    assert errors == "maskcast: --secret-key and --allowed-clients go together; give both\n"


def test_rights_are_written_by_a_command_and_decide_what_is_seen(folder: Path) -> None:
    keys = ServerKeys.read(folder / "server.key_secret", folder / "clients")
    with Publisher("tcp://127.0.0.1:0", ("background",), keys=keys) as publisher:
        code, output, errors = run(
            folder, "keys", "allow", "clients/anna.key", "--sources", "door, yard*", "--control"
        )
        assert (code, errors) == (0, "")
        assert output == "clients/anna.yaml: sees and controls door, yard*\n"
        pair = ("--server-key", "server.key", "--client-key", "clients/anna.key_secret")
        options = (*pair, "--json", "--timeout-s", "60", "--limit", "20")
        with start(folder, "watch", publisher.endpoint, *options) as process:
            while process.poll() is None:
                for source in ("door", "cellar", "yard1"):
                    publisher.publish(frame(source), seen())
                time.sleep(0.02)
            assert process.stdout is not None
            received = {json.loads(line)["source"] for line in process.stdout}
        assert received == {"door", "yard1"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("clients/anna.key", "--sources", "a/b"), "invalid source 'a/b'"),
        (("clients/nobody.key", "--sources", "*"), "nobody.key"),
        (("clients/anna.key_secret", "--sources", "*"), "contains a secret key"),
    ],
)
def test_a_mistake_in_rights_is_reported_in_one_line(
    folder: Path, arguments: tuple[str, ...], problem: str
) -> None:
    code, output, errors = run(folder, "keys", "allow", *arguments)
    assert (code, output) == (2, "")
    assert problem in errors
    assert errors.count("\n") == 1


def test_a_folder_without_rights_files_stops_the_pipeline_with_the_command_that_writes_them(
    folder: Path, timed_engine: Any, free_port: int
) -> None:
    (folder / "clients" / "anna.yaml").unlink()
    endpoint = f"tcp://127.0.0.1:{free_port}"
    with pytest.raises(InputError, match=r"maskcast keys allow .*anna\.key --sources"):
        Pipeline(published(folder, endpoint), timed_engine()).run()
