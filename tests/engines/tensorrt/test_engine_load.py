"""Which engine a TensorRT bundle gets, with and without a GPU."""

from __future__ import annotations

import logging

import pytest
from host_tensorrt import make_bundle

from maskcast.engines.errors import InputError
from maskcast.engines.load import load_engine
from maskcast.engines.openvino.engine import OpenVinoEngine
from maskcast.engines.tensorrt.plugins.library import compute_capability
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.stages.infer import load_engine_for

needs_no_gpu = pytest.mark.skipif(
    compute_capability() is not None, reason="tests a machine without a GPU"
)


@needs_no_gpu
def test_auto_runs_a_tensorrt_bundle_on_the_cpu_and_says_why(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        engine = load_engine(make_bundle(tmp_path / "bundle"))
    assert isinstance(engine, OpenVinoEngine)
    engine.close()
    (record,) = caplog.records
    assert record.getMessage() == "tensorrt_unavailable"
    assert record.fields["bundle"] == str(tmp_path / "bundle")
    assert record.fields["reason"]


@needs_no_gpu
def test_tensorrt_requested_by_name_is_not_replaced(tmp_path):
    with pytest.raises(InputError, match=r"TensorRT cannot run it \(.*(GPU|installed)"):
        load_engine(make_bundle(tmp_path / "bundle"), "tensorrt")


@pytest.mark.host_gpu
def test_auto_takes_tensorrt_where_there_are_a_plan_and_a_gpu(tmp_path):
    # The plan is a double's: TensorRT is chosen and refuses it.
    with pytest.raises(InputError, match=r"detector\.plan cannot run here"):
        load_engine(make_bundle(tmp_path / "bundle"))


@pytest.mark.parametrize("spin", [False, True])
def test_a_configuration_decides_whether_the_engine_spins(tmp_path, monkeypatch, spin):
    made = []
    monkeypatch.setattr("maskcast.engines.tensorrt.plan.unavailable_reason", lambda bundle: None)
    monkeypatch.setattr(
        "maskcast.engines.tensorrt.engine.TensorRTEngine",
        lambda bundle, **options: made.append(options),
    )
    bundle = make_bundle(tmp_path / "bundle").path
    model = {"bundle": str(bundle), "spin": spin} if spin else {"bundle": str(bundle)}
    load_engine_for(make_config({"sources": ["test://"], "model": model}))
    assert made == [{"spin": spin, "pose": False}]
