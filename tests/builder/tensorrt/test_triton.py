"""The model repository for Triton, checked against Triton's own schema."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from maskcast.builder.tensorrt.triton import check_triton, write_repository
from maskcast.engines.bundle import Bundle, FixedInput, default_bundle, open_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.plan import Plan

pytestmark = pytest.mark.skipif(
    not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
)

# The schema comes with Triton's client; loaded alone, it needs protobuf and nothing else.
PARSE = """
import importlib.util, json, sys
from google.protobuf import json_format, text_format
spec = importlib.util.spec_from_file_location("model_config_pb2", sys.argv[1])
schema = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schema)
found = {}
for path in sys.argv[2:]:
    config = text_format.Parse(open(path).read(), schema.ModelConfig())
    found[config.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Write the repository of the default bundle, with fake plans: their content is not read."""
    default = open_bundle("default")
    folder = tmp_path_factory.mktemp("bundle")
    for name in ("detector", "segmenter"):
        (folder / f"{name}.plan").write_bytes(name.encode())
        (folder / f"{name}.onnx").write_bytes((default.path / f"{name}.onnx").read_bytes())
    plans = tuple(
        Plan(
            graph=name, file=f"{name}.plan", sha256="0" * 64, package="tensorrt", version="11.4",
            capabilities=("8.9",), precision="fp16", height=160, width=256, max_batch=2,
            max_boxes=most, graph_sha256="0" * 64, plugins={},
        )
        for name, most in (("detector", 0), ("segmenter", 200), ("poser", 200))
    )  # fmt: skip
    manifest = replace(
        default.manifest, name="a b/c", precision="fp16", input=FixedInput(160, 256), plans=plans
    )
    out = tmp_path_factory.mktemp("triton") / "models"
    write_repository(Bundle(folder, manifest), out)
    return out


def test_it_holds_two_plans_and_an_ensemble(repository):
    assert sorted(path.name for path in repository.iterdir()) == [
        "a_b_c", "a_b_c_detector", "a_b_c_segmenter",
    ]  # fmt: skip
    plan = repository / "a_b_c_segmenter" / "1" / "model.plan"
    assert plan.read_bytes() == b"segmenter"
    assert (repository / "a_b_c" / "1").is_dir()  # Triton needs a version of an ensemble too


def test_every_configuration_follows_tritons_schema(repository):
    client = find_spec("tritonclient")
    if client is None or client.submodule_search_locations is None:
        pytest.skip("tritonclient is not installed")
    schema = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    paths = sorted(repository.glob("*/config.pbtxt"))
    done = subprocess.run(
        [sys.executable, "-c", PARSE, schema, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    models = msgspec.json.decode(done.stdout)
    assert set(models) == {"a_b_c", "a_b_c_detector", "a_b_c_segmenter"}
    segmenter = {tensor["name"]: tensor for tensor in models["a_b_c_segmenter"]["input"]}
    assert segmenter["boxes"]["dims"] == ["1", "100", "4"]
    assert segmenter["boxes"]["reshape"]["shape"] == ["100", "4"]
    assert segmenter["p2"]["data_type"] == "TYPE_FP16"
    assert segmenter["p2"]["dims"][2:] == ["40", "64"]
    ensemble = models["a_b_c"]
    inputs = {tensor["name"]: tensor["dims"] for tensor in ensemble["input"]}
    assert inputs["images"] == ["1", "3", "160", "256"]
    assert inputs["batch_index"] == ["100"]
    assert {tensor["name"] for tensor in ensemble["output"]} == {
        "boxes", "scores", "labels", "counts", "masks",
    }  # fmt: skip
    # Everything that a step reads comes from the client or from a step before it.
    known = set(inputs)
    for step in ensemble["ensemble_scheduling"]["step"]:
        model = models[step["model_name"]]
        assert set(step["input_map"]) == {tensor["name"] for tensor in model["input"]}
        assert set(step["input_map"].values()) <= known
        known |= set(step["output_map"].values())
    assert {tensor["name"] for tensor in ensemble["output"]} <= known


def test_what_triton_does_not_run_is_refused_before_anything_is_built():
    with pytest.raises(InputError, match=r"--triton: Triton runs plans of tensorrt, not of openvi"):
        check_triton("openvino")
    check_triton("tensorrt")
