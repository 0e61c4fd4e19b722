"""Health: whether a pipeline does what it is there for, and what is wrong if it does not."""

from __future__ import annotations

from collections.abc import Container

import msgspec

from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import RECORD, SourceStats, Stats

STUCK_AFTER_S = 10.0
"""A stage that has been at one piece of work for so long does not answer any more."""

_GOOD_ENDS = frozenset({"end of stream", "limit", "stopped", "removed"})


class Health(msgspec.Struct, frozen=True):
    """What a health check found.

    Attributes:
        healthy: whether nothing is wrong.
        problems: what is, a line each, without credentials.
        sources: what each source is doing.
        outputs: ``recording``, or why an output is not written. It is no problem: a restart would
            not free a full disk, and would end what is published.
    """

    healthy: bool
    problems: list[str]
    sources: dict[str, str]
    outputs: dict[str, str] = msgspec.field(default_factory=dict)


def check_health(stats: Stats, optional: Container[str] = ()) -> Health:
    """Judge a pipeline by its figures.

    It is healthy when every source streams or has come to its proper end, and every stage, the
    engine's above all, gets done what it has begun.

    Args:
        stats: the figures of this moment.
        optional: names of sources that may be away.
    """
    problems = [
        f"{source.name} is {source.state}" + (f": {source.detail}" if source.detail else "")
        for source in stats.sources
        if source.name not in optional and not _is_well(source)
    ]
    problems += [
        f"{stage} has been at one piece of work for {at_work_s:.0f} s"
        for stage, at_work_s in stats.at_work_s.items()
        if at_work_s >= STUCK_AFTER_S and stage != RECORD
    ]
    states = {source.name: str(source.state) for source in stats.sources}
    return Health(not problems, problems, states, _outputs(stats))


def _is_well(source: SourceStats) -> bool:
    return source.state is SourceState.STREAMING or source.ended in _GOOD_ENDS


def _outputs(stats: Stats) -> dict[str, str]:
    at_work_s = stats.at_work_s.get(RECORD, 0.0)
    stuck = f"no answer for {at_work_s:.0f} s" if at_work_s >= STUCK_AFTER_S else ""
    return {name: problem or stuck or "recording" for name, problem in stats.outputs.items()}
