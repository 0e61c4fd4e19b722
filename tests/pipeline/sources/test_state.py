from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.pipeline.sources.state import SourceState, StateChange, StateMachine

LEGAL = {
    ("connecting", "streaming"),
    ("connecting", "reconnecting"),
    ("streaming", "stalled"),
    ("streaming", "reconnecting"),
    ("stalled", "streaming"),
    ("stalled", "reconnecting"),
    ("reconnecting", "streaming"),
    ("reconnecting", "reconnecting"),
}
EVENTS = st.lists(
    st.one_of(
        st.just(("frame",)),
        st.tuples(st.just("silent"), st.floats(0, 10)),
        st.tuples(st.just("lost"), st.sampled_from(["refused", "denied"])),
    ),
    max_size=40,
)


@given(events=EVENTS)
def test_every_change_is_legal_and_reported_once(events) -> None:
    changes: list[StateChange] = []
    machine = StateMachine(2.0, changes.append)
    machine.begin()
    for name, *arguments in events:
        getattr(machine, name)(*arguments)
        assert changes[-1].state is machine.state
    machine.end("stopped")
    machine.end("stopped")
    assert changes[0] == StateChange(SourceState.CONNECTING)
    assert (changes[-1].state, changes[-1].reason) == (SourceState.ENDED, "stopped")
    for before, after in pairwise(changes[:-1]):
        assert before != after
        assert (before.state, after.state) in LEGAL
    states = [change.state for change in changes]
    first = states.index(SourceState.STREAMING) if SourceState.STREAMING in states else len(states)
    assert changes[-1].reconnects == sum(
        (before, after) == (SourceState.RECONNECTING, SourceState.STREAMING)
        for before, after in pairwise(states[first:])
    )


def test_silence_stalls_until_the_next_frame() -> None:
    changes: list[StateChange] = []
    machine = StateMachine(2.0, changes.append)
    machine.begin()
    machine.silent(60.0)  # a source that has not begun is not stalled
    machine.frame()
    machine.silent(1.9)
    assert machine.state is SourceState.STREAMING
    machine.silent(2.1)
    assert changes[-1] == StateChange(SourceState.STALLED, "no frame for 2.1 s")
    machine.silent(3.0)
    machine.frame()
    assert [change.state for change in changes] == [
        "connecting",
        "streaming",
        "stalled",
        "streaming",
    ]


def test_only_a_new_reason_is_reported() -> None:
    changes: list[StateChange] = []
    machine = StateMachine(2.0, changes.append)
    machine.begin()
    for reason in ("refused", "refused", "denied", "denied"):
        machine.lost(reason)
    assert [change.reason for change in changes] == ["", "refused", "denied"]


def test_nothing_follows_the_end() -> None:
    machine = StateMachine(2.0, lambda change: None)
    machine.begin()
    machine.end("stopped")
    with pytest.raises(RuntimeError, match="ended cannot become streaming"):
        machine.frame()
