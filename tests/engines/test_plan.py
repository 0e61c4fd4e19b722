from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from maskcast.engines.plan import Plan, incompatibility, rebuild_command

PLAN = Plan(
    graph="detector",
    file="detector.plan",
    sha256="a",
    package="tensorrt_rtx",
    version="1.7.1",
    capabilities=("8.6", "8.9"),
    precision="fp16",
    height=288,
    width=512,
    max_batch=4,
    graph_sha256="b",
    plugins={"GroupedNms": "1"},
)
HERE = {
    "version": "1.7.1",
    "capability": (8, 9),
    "graph_sha256": "b",
    "plugins": {"GroupedNms": "1", "MultiscaleRoiAlign": "1"},
}


def test_a_plan_fits_the_machine_it_was_built_for():
    assert incompatibility(PLAN, **HERE) is None


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"version": "1.8.0"}, "built with tensorrt_rtx 1.7.1, and 1.8.0 is installed"),
        ({"capability": (12, 0)}, "for compute capability 8.6, 8.9, and this GPU has 12.0"),
        ({"graph_sha256": "c"}, "the bundle's detector has changed"),
        ({"plugins": {"GroupedNms": "2"}}, "version 1 of the plugin GroupedNms.* has 2"),
        ({"plugins": {}}, "version 1 of the plugin GroupedNms.* has none"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(here, reason):
    found = incompatibility(PLAN, **(HERE | here))
    assert found is not None
    assert re.search(reason, found)


def test_the_command_builds_the_same_plan_for_this_gpu():
    second = replace(PLAN, graph="segmenter")
    assert rebuild_command((PLAN, second), "my bundle", (12, 0)) == (
        "maskcast build 'my bundle' --backend tensorrt_rtx --precision fp16 --size 288x512 "
        "--batch 4 --compute-capability 12.0 --out 'my bundle'"
    )
