"""``maskcast build``, as a user calls it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from maskcast.builder.build_command import parse_size, read_labels
from maskcast.builder.commands import mount
from maskcast.engines.bundle import open_bundle
from maskcast.engines.errors import InputError


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    mount(app)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_a_bundle_becomes_a_tensorrt_bundle(tmp_path):
    out = tmp_path / "gpu"
    options = ["--backend", "tensorrt_rtx", "--precision", "fp16", "--size", "96x160"]
    options += ["--batch", 2, "--compute-capability", "8.6", "--compute-capability", "12.0"]
    options += ["--score-threshold", 0.25]
    result = run("build", "default", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert "peak memory" in result.stderr
    detector = open_bundle(out).manifest.plans[0]
    assert open_bundle(out).manifest.score_threshold == 0.25
    assert detector.capabilities == ("8.6", "12.0")
    assert (detector.height, detector.width, detector.max_batch) == (96, 160, 2)


def test_build_says_how_to_run_the_result(tmp_path):
    out = tmp_path / "mine"
    result = run("build", "default", "--out", out, "--precision", "int8", "--labels", "human")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("built mine, openvino int8, ")
    assert line.endswith(f"run it with: maskcast run SOURCE --model {out}")
    assert open_bundle(out).manifest.labels == ("background", "human")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "512"], "give --size HEIGHTxWIDTH"),
        (["--size", "96x160", "--precision", "bf16"], "choose fp32, fp16 or int8"),
        (
            ["--size", "96x160", "--precision", "int8", "--calibration", "/nowhere"],
            "/nowhere: no such folder",
        ),
        (["--size", "wide"], "give HEIGHTxWIDTH, for example"),
    ],
)
def test_an_invalid_option_is_an_input_error(tmp_path, options, message):
    result = run("build", "default", "--out", tmp_path / "x", "--backend", "tensorrt_rtx", *options)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("800x1344", (800, 1344)), ("512", 512), ("0x0", (0, 0))]
)
def test_a_size_is_two_sides_or_one(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "5x", "-5", "1x2x3", "9999999", "5 x 5"])
def test_any_other_size_is_refused(text):
    with pytest.raises(InputError, match="give HEIGHTxWIDTH"):
        parse_size(text)


def test_labels_are_a_list_or_the_lines_of_a_file(tmp_path: Path) -> None:
    assert read_labels("cat, dog,  traffic light") == ("cat", "dog", "traffic light")
    assert read_labels("cat") == ("cat",)
    file = tmp_path / "labels.txt"
    file.write_text("cat\n traffic light \n\n")
    assert read_labels(str(file)) == ("cat", "traffic light")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a readable UTF-8 file"):
        read_labels(str(file))
    with pytest.raises(InputError, match="not a readable UTF-8 file"):
        read_labels(str(tmp_path))
