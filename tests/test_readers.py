"""The readers in other languages, on the golden messages and on a publisher."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import zmq
from publishers import NAMES, frame, seen

from maskcast.pipeline.publisher.publisher import Publisher

ROOT = Path(__file__).parents[1]
READERS = ROOT / "examples" / "readers"
MALFORMED = sorted((ROOT / "tests" / "golden" / "malformed").glob("*.json"))
GOLDEN = sorted((ROOT / "tests" / "golden").glob("instances_*.json"))


@pytest.fixture(scope="module", params=["cpp", "mjs", "rs"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("reader")
    source = shutil.copy(READERS / f"reader.{request.param}", folder)
    if request.param == "cpp":
        libraries = ("/usr/include/zmq.h", "/usr/include/nlohmann/json.hpp")
        if not shutil.which("g++") or not all(Path(path).exists() for path in libraries):
            pytest.skip("g++, libzmq3-dev or nlohmann-json3-dev is not installed")
        program = str(folder / "reader")
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["g++", *flags, source, "-lzmq", "-o", program], check=True)
        return [program]
    if request.param == "rs":
        if not shutil.which("rustc") or not Path("/usr/include/zmq.h").exists():
            pytest.skip("rustc or libzmq3-dev is not installed")
        program = str(folder / "reader")
        flags = ["--edition", "2021", "-O", "-D", "warnings"]
        subprocess.run(["rustc", *flags, source, "-o", program], check=True)
        return [program]
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    install = ["npm", "install", "--no-audit", "--no-fund", "zeromq@6", "@msgpack/msgpack@3"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm packages cannot be installed: {done.stderr[-300:]}")
    return ["node", str(source)]


def test_a_reader_finds_the_areas_of_the_golden_masks_and_the_keypoints(reader: list[str]) -> None:
    for path in GOLDEN:
        golden = json.loads(path.read_text())
        done = subprocess.run([*reader, str(path)], capture_output=True, text=True, check=True)
        printed = json.loads(done.stdout)
        assert printed["index"] == golden["header"]["index"]
        assert printed["areas"] == (golden.get("areas") or []), path.name
        assert printed.get("keypoints") == golden.get("keypoints"), path.name


@pytest.mark.parametrize("path", MALFORMED, ids=[path.stem for path in MALFORMED])
def test_a_reader_refuses_the_malformed_golden_messages_in_one_line(
    reader: list[str], path: Path
) -> None:
    done = subprocess.run([*reader, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_reader_receives_every_frame_of_a_publisher(reader: list[str]) -> None:
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        process = subprocess.Popen([*reader, publisher.endpoint], stdout=subprocess.PIPE)
        try:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            for index in range(30):
                publisher.publish(frame(index=index), seen(index % 3))
            publisher.event("cam1", "ended")
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    frames = [json.loads(line) for line in output.splitlines()]
    assert [printed["index"] for printed in frames] == list(range(30))
    for index, printed in enumerate(frames):
        expected = seen(index % 3)
        assert printed["areas"] == [int(expected.mask(i).sum()) for i in range(index % 3)]


def test_a_reader_continues_after_a_malformed_message(reader: list[str]) -> None:
    def parts(path: Path) -> list[bytes]:
        return [bytes.fromhex(part) for part in json.loads(path.read_text())["parts"]]

    messages = [parts(path) for path in (MALFORMED[0], GOLDEN[0])]
    messages.append(parts(ROOT / "tests" / "golden" / "event_ended.json"))
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.linger = 0
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        command = [*reader, f"tcp://127.0.0.1:{port}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert publisher.poll(60_000)
            for message in messages:
                publisher.send_multipart(message)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert len(output.splitlines()) == 1
    assert len(errors.splitlines()) == 1
