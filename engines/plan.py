"""Plan: a graph compiled by TensorRT, and whether it can run on this machine."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Package = Literal["tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]

Side = Annotated[int, Meta(ge=64, le=4096, multiple_of=32)]
"""Height or width of a network's input, pixels."""
FileName = Annotated[str, Meta(pattern=r"\A(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,255}\Z")]
"""Name of a file in the bundle's own folder."""
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Capability = Annotated[str, Meta(pattern=r"\A[0-9]{1,2}\.[0-9]\Z")]
ShortText = Annotated[str, Meta(max_length=255)]


GraphName = Literal["detector", "segmenter", "poser"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A TensorRT plan of a bundle.

    Attributes:
        graph: which of the bundle's graphs it was compiled from.
        file, sha256: the plan's file in the bundle, and its SHA-256.
        package, version: what compiled it; a plan runs in the same version only.
        capabilities: compute capabilities that it runs on, "8.6".
        precision: the number format that it computes in.
        height, width: of the network's input, pixels.
        max_batch: maximum number of images.
        max_boxes: maximum number of boxes of a segmenter or a poser; 0 for a detector.
        graph_sha256: of the portable graph.
        plugins: versions of the plugins inside, by name.
    """

    graph: GraphName
    file: FileName
    sha256: Sha256
    package: Package
    version: ShortText
    capabilities: Annotated[tuple[Capability, ...], Meta(max_length=32)]
    precision: Precision
    height: Side
    width: Side
    max_batch: Annotated[int, Meta(ge=1, le=1024)]
    max_boxes: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    graph_sha256: Sha256
    plugins: Annotated[dict[ShortText, ShortText], Meta(max_length=32)]


def incompatibility(
    plan: Plan,
    *,
    version: str,
    capability: tuple[int, int],
    graph_sha256: str,
    plugins: dict[str, str],
) -> str | None:
    """Return why a plan cannot run here; None if it can.

    Args:
        plan: from the bundle's manifest.
        version: of the installed package ``plan.package``.
        capability: compute capability of the GPU.
        graph_sha256: of the portable graph in the bundle.
        plugins: versions of the plugins that this maskcast has, by name.
    """
    here = f"{capability[0]}.{capability[1]}"
    if plan.version != version:
        return f"it was built with {plan.package} {plan.version}, and {version} is installed"
    if here not in plan.capabilities:
        built = ", ".join(plan.capabilities)
        return f"it was built for compute capability {built}, and this GPU has {here}"
    if plan.graph_sha256 != graph_sha256:
        return f"the bundle's {plan.graph} has changed since it was built"
    for name, wanted in plan.plugins.items():
        if plugins.get(name) != wanted:
            have = plugins.get(name, "none")
            return f"it needs version {wanted} of the plugin {name}, and this maskcast has {have}"
    return None


def rebuild_command(plans: tuple[Plan, ...], bundle: str, capability: tuple[int, int]) -> str:
    """Return the command that builds the plans of a bundle again for a GPU."""
    plan, bundle = plans[0], shlex.quote(bundle)
    return (
        f"maskcast build {bundle} --backend {plan.package} --precision {plan.precision} "
        f"--size {plan.height}x{plan.width} --batch {plan.max_batch} "
        f"--compute-capability {capability[0]}.{capability[1]} --out {bundle}"
    )
