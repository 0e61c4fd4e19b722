"""``maskcast cluster status``, and the default control endpoint of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskcast.pipeline.control.messages import ClusterReport, Placement, SourceReport


def default_control() -> str:
    """Return the control endpoint of a cluster whose configuration has none.

    The socket is in a folder that belongs to the user.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache" / "maskcast")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return f"ipc://{folder / 'maskcast-cluster.sock'}"


def status_lines(cluster: ClusterReport, sources: Sequence[SourceReport]) -> Iterator[str]:
    """Yield the status of a cluster: its nodes, its gateway, its sources."""
    for node in cluster.nodes:
        here = sum(source.node == node.name for source in sources)
        gpus = f", {node.gpus:g} GPU" if node.gpus else ""
        yield (
            f"node {node.name} ({node.id[:8]}, {node.address}): {node.cpus:g} CPU{gpus}, "
            f"{here} sources"
        )
    gateway = cluster.gateway
    state = f"pid {gateway.pid}" if gateway.pid else "down"
    yield (
        f"gateway {gateway.endpoint}: {state}, {gateway.publishers} publishers, "
        f"{gateway.subscribers} subscribers, {gateway.lost} lost, {gateway.restarts} restarts"
    )
    for source in sources:
        yield f"{source.name}: " + ", ".join(_describe(source))


def shown_state(source: SourceReport) -> str:
    """Return the state of a running source, or the placement of one that does not run."""
    return source.state if source.placement is Placement.RUNNING else str(source.placement)


def _describe(source: SourceReport) -> Iterator[str]:
    yield shown_state(source)
    if source.node:
        yield f"on {source.node}"
    yield f"{source.fps:.1f} fps"
    yield f"{source.processed} processed"
    yield f"{source.dropped} dropped"
    yield f"{source.restarts} restarts"
    if source.detail:
        yield source.detail
