"""``maskcast build --backend tensorrt_rtx``, as a user calls it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import typer
from typer.testing import CliRunner

from maskcast.builder.commands import mount
from maskcast.engines.bundle import default_bundle, open_bundle
from maskcast.engines.errors import InputError


def run(*arguments):
    app = typer.Typer()
    mount(app)
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(
    not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "512"], "give HEIGHTxWIDTH"),
        (["--size", "96x160", "--precision", "bf16"], "computes in fp32, fp16 or int8"),
        (["--size", "96x160", "--calibration", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_a_slip_is_one_line(tmp_path, options, message):
    result = run("build", "default", "--out", tmp_path / "x", "--backend", "tensorrt_rtx", *options)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
