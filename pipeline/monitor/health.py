"""Health: whether a pipeline works, and the problems if it does not."""

from __future__ import annotations

import time
from collections.abc import Container

import msgspec

from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import RECORD, SourceStats, Stats

STUCK_AFTER_S = 10.0
"""A stage that has worked on one item for this many seconds counts as stuck."""

_GOOD_ENDS = frozenset({"end of stream", "limit", "stopped", "removed"})


class Health(msgspec.Struct, frozen=True):
    """The result of a health check.

    Attributes:
        healthy: whether there are no problems.
        problems: one line each, without credentials.
        sources: the state of each source.
        outputs: ``recording``, or why an output is not written. This is not a problem: a restart
            would not free a full disk, and would interrupt publishing.
    """

    healthy: bool
    problems: list[str]
    sources: dict[str, str]
    outputs: dict[str, str] = msgspec.field(default_factory=dict)


def check_health(stats: Stats, optional: Container[str] = (), now_s: float | None = None) -> Health:
    """Check the health of a pipeline from its figures.

    It is healthy if every source is streaming or has ended normally, no stage is stuck, and the
    system's clock can be published.

    Args:
        stats: the current figures.
        optional: names of sources that need not stream.
        now_s: seconds since 1970 by the system's clock; None for now.
    """
    now_s = time.time() if now_s is None else now_s
    problems = [
        f"{source.name} is {source.state}" + (f": {source.detail}" if source.detail else "")
        for source in stats.sources
        if source.name not in optional and not _is_healthy(source)
    ]
    problems += [
        f"{stage} has been at work on one item for {at_work_s:.0f} s"
        for stage, at_work_s in stats.at_work_s.items()
        if at_work_s >= STUCK_AFTER_S and stage != RECORD
    ]
    if now_s < 0:
        problems.append(
            "the system clock is before 1970: subscribers reject all messages; set the clock"
        )
    states = {source.name: str(source.state) for source in stats.sources}
    return Health(not problems, problems, states, _outputs(stats))


def _is_healthy(source: SourceStats) -> bool:
    return source.state is SourceState.STREAMING or source.ended in _GOOD_ENDS


def _outputs(stats: Stats) -> dict[str, str]:
    at_work_s = stats.at_work_s.get(RECORD, 0.0)
    stuck = f"no answer for {at_work_s:.0f} s" if at_work_s >= STUCK_AFTER_S else ""
    return {name: problem or stuck or "recording" for name, problem in stats.outputs.items()}
