"""``maskcast ctl`` as a user runs it: real processes, a real camera."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import maskcast

ROOT = Path(maskcast.__file__).parents[1]
COMMAND = [sys.executable, "-m", "maskcast"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            *(*COMMAND, "run", "--control", f"ipc://{tmp_path}/control"),
            *("--publish", f"ipc://{tmp_path}/messages"),
            *("--log-level", "debug", "--log-format", "json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    yield process
    process.kill()
    process.communicate()


def test_sources_are_added_and_removed_at_the_command_line(
    pipeline, rtsp_server, make_clip, tmp_path: Path
) -> None:
    rtsp_server.start("--credentials", "admin:hunter2")
    url = rtsp_server.url.replace("//", "//admin:hunter2@")
    control = f"ipc://{tmp_path}/control"
    shown = []

    def ctl(*words: str | Path, code: int = 0) -> str:
        if words[0] != "--timeout-s":
            words = ("--timeout-s", "90", *words)
        result = run("ctl", *words[:2], control, *words[2:])
        shown.append(result.stdout + result.stderr)
        assert result.returncode == code, result.stderr
        assert code == 0 or len(result.stderr.splitlines()) == 1, result.stderr
        return result.stdout if code == 0 else result.stderr

    headings = ["name", "state", "fps", "processed", "skipped", "dropped"]
    assert ctl("list").split() == headings  # it may still load its model
    assert ctl("add", "door", url, "--max-fps", "5").startswith("door: added, ")
    assert ctl("add", "clip", make_clip(), "--loop", "--policy", "latest").startswith("clip: added")
    watched = run(
        "watch",
        f"ipc://{tmp_path}/messages",
        "--source",
        "door",
        "--json",
        "--limit=2",
        "--timeout-s=200",
    )
    assert watched.returncode == 0, watched.stderr
    _, door, door_url, clip, _ = ctl("list").splitlines()
    assert door.split()[:2] == ["door", "streaming"]
    assert door_url == f"  {url.replace('admin:hunter2', '***')}, 320x240, latest"
    assert clip.split()[:2] == ["clip", "streaming"]
    door_json, clip_json = json.loads(ctl("list", "--json"))
    assert (door_json["state"], door_json["width"], clip_json["policy"]) == (
        *("streaming", 320),
        "latest",
    )
    assert door_json["skipped"] > 0
    (broken := tmp_path / "broken.mp4").write_text("no video")
    failed = ctl("add", "broken", broken, code=2)
    assert "broken: added, but it has failed, and keeps its name until you remove it: " in failed
    assert "video that FFmpeg can read" in failed
    ctl("remove", "broken")
    absent = ctl("add", "absent", "rtsp://127.0.0.1:1/cam")
    assert absent.startswith("absent: added, but not reached yet; it is retried: ")
    ctl("remove", "absent")
    assert "there is a source 'door' already" in ctl("add", "door", url, code=2)
    assert "scheme 'gopher'" in ctl("add", "x", "gopher://admin:hunter2@host", code=2)
    assert "no such file" in ctl("add", "x", "nosuch.mp4", code=2)
    assert "policy" in ctl("add", "x", "test://8x8@1", "--policy", "newest", code=2)
    assert "no source 'yard'; there are: door, clip" in ctl("remove", "yard", code=2)
    rtsp_server.stop()
    while json.loads(ctl("list", "--json"))[0]["state"] in ("streaming", "stalled"):
        pass  # each call takes a moment
    assert ctl("remove", "door") == "door: removed\n"
    assert [source["name"] for source in json.loads(ctl("list", "--json"))] == ["clip"]
    pipeline.send_signal(signal.SIGTERM)
    output, errors = pipeline.communicate(timeout=120)
    assert (pipeline.returncode, output) == (0, ""), errors
    events = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert {"control_open", "source_added", "source_state", "source_removed"} <= {
        event["event"] for event in events
    }
    lost = [event for event in events if event.get("state") == "reconnecting"]
    assert [event["level"] for event in lost][:1] == ["warning"]
    assert "hunter2" not in errors + watched.stdout + watched.stderr + "".join(shown)
    assert "no answer" in ctl("--timeout-s", "1", "list", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "ctl --timeout-s 0.1 tcp://127.0.0.1:1 list",
            "no answer from tcp://127.0.0.1:1 ",
        ),
        (
            "ctl --timeout-s 0.1 ipc:///nowhere list",
            "within 0.1 s: there is no socket /nowhere; start `maskcast run --control ipc:///nowhere`",
        ),
        (
            "cluster --timeout-s 0.1 --control ipc:///nowhere status",
            "there is no socket /nowhere; start `maskcast cluster run --config FILE`",
        ),
        ("ctl nowhere list", "invalid endpoint 'nowhere'"),
        ("ctl --server-key a.key ipc:///nowhere list", "keys go together"),
        ("run test://8x8@1 --control nowhere", "invalid endpoint 'nowhere'"),
        ("run test://8x8@1 --control tcp://*:0", "anyone on the network could control this"),
        ("run test://8x8@1 --log-level loud", "log level 'loud'"),
        ("run test://8x8@1 --log-format xml", "log format 'xml'"),
    ],
)
def test_a_users_mistake_is_reported_in_one_line(
    arguments: str, message: str, tmp_path: Path
) -> None:
    words = arguments.split()
    if words[0] == "run":
        words += ["--publish", f"ipc://{tmp_path}/messages"]
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr


def test_credentials_never_reach_the_log(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(*COMMAND, "run", "rtsp://admin:hunter2@127.0.0.1:1/stream", "test://64x48@10"),
            *("--limit", "10", "--publish", f"ipc://{tmp_path}/messages", "--log-level", "debug"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    with process:
        reported = ""
        while "event=source_unreachable" not in reported or "reason=limit" not in reported:
            line = process.stderr.readline()
            assert line, reported
            reported += line
        process.terminate()
        reported += process.stderr.read()
    assert process.returncode == 0
    assert "source_unreachable source=127.0.0.1-stream" in reported
    assert "hunter2" not in reported
