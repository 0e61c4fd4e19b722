"""What is reported when there is no Ray, or no cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import maskcast
from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.ray_cluster import RayCluster

ROOT = Path(maskcast.__file__).parents[1]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'maskcast\[cluster\]'"):
        RayCluster("local", 1, 0)


@pytest.mark.parametrize("address", ["nowhere", "ray://"])
def test_an_address_without_a_cluster_is_reported(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "fleet.yaml").write_text("sources: [test://64x48@1]\ncluster: {}\n")
    command = [sys.executable, "-m", "maskcast", "cluster", "run", "--config", "fleet.yaml"]
    result = subprocess.run(
        [*command, "--address", address],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path)},
        cwd=tmp_path,
        timeout=400,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert f"no Ray cluster at {address}: " in result.stderr.splitlines()[-1]  # after Ray's notes
