import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.wire import losses as losses_module
from maskcast.pipeline.wire.losses import Gap, LossTracker
from maskcast.pipeline.wire.message import EventHeader, InstancesHeader

A, B = "a" * 16, "b" * 16


def instances(seq, publisher=A):
    return InstancesHeader(
        publisher=publisher,
        seq=seq,
        index=seq,
        capture_ns=0,
        publish_ns=0,
        width=1,
        height=1,
        count=0,
        masks="none",
    )


def event(name, seq=0, sent=0, publisher=A, **data):
    return EventHeader(publisher=publisher, seq=seq, publish_ns=0, event=name, sent=sent, data=data)


@settings(max_examples=200, deadline=None)
@given(arrived=st.sets(st.integers(0, 60), min_size=1))
def test_received_and_lost_are_all_that_was_sent_since_the_first(arrived):
    ledger, arrived = LossTracker(), sorted(arrived)
    gaps = [ledger.enter_instances("cam1", instances(seq)) for seq in arrived]
    assert gaps[0] == Gap(0, restarted=False)
    assert ledger.tally.received == len(arrived)
    assert ledger.tally.received + ledger.tally.lost == arrived[-1] - arrived[0] + 1
    assert sum(gap.lost for gap in gaps) == ledger.tally.lost


def test_losses_are_kept_apart_by_source():
    ledger = LossTracker()
    for source, seq in (("a", 0), ("b", 7), ("a", 1), ("b", 8)):
        assert ledger.enter_instances(source, instances(seq)).lost == 0
    assert ledger.enter_instances("a", instances(4)).lost == 2


def test_a_restarted_publisher_is_told_of_once_and_nothing_is_lost():
    ledger = LossTracker()
    ledger.enter_instances("cam1", instances(100))
    assert ledger.enter_instances("cam1", instances(0, B)) == Gap(0, restarted=True)
    assert ledger.enter_instances("cam1", instances(1, B)) == Gap(0, restarted=False)
    assert ledger.tally.lost == 0


def test_a_message_that_comes_twice_counts_once():
    ledger = LossTracker()
    ledger.enter_instances("cam1", instances(3))
    assert ledger.enter_instances("cam1", instances(3)) is None
    assert ledger.enter_instances("cam1", instances(4)).lost == 0
    assert (ledger.tally.received, ledger.tally.duplicate) == (2, 1)


def test_the_messages_lost_before_an_event_are_counted():
    ledger = LossTracker()
    ledger.enter_instances("cam1", instances(0))
    assert ledger.enter_event("cam1", event("ended", sent=5)).lost == 4
    assert ledger.tally.lost == 4
    assert ledger.enter_instances("cam1", instances(5)).lost == 0


def test_an_event_that_is_sent_again_is_none():
    ledger = LossTracker()
    assert ledger.enter_event("cam1", event("state", seq=4, state="running")) is not None
    assert ledger.enter_event("cam1", event("labels", seq=0, id="x", names=["n"])) is not None
    assert ledger.enter_event("cam1", event("state", seq=4, state="running")) is None
    assert ledger.enter_event("cam1", event("state", seq=5, state="lost")) is not None
    assert ledger.states() == {"cam1": "lost"}


def test_label_names_are_known_by_their_id():
    ledger = LossTracker()
    ledger.enter_event("cam1", event("labels", id="0a", names=["background", "cat"]))
    ledger.enter_event("cam1", event("labels", seq=1, id="0b", names="nonsense"))
    assert ledger.label_names("0a") == ("background", "cat")
    assert ledger.label_names("0b") == ()


def test_all_have_ended_when_each_one_wanted_has():
    ledger = LossTracker()
    assert not ledger.all_ended(None)
    ledger.enter_event("a", event("ended"))
    assert ledger.all_ended(None)
    assert ledger.all_ended(("a",))
    assert not ledger.all_ended(("a", "b"))
    ledger.enter_instances("b", instances(0))
    assert not ledger.all_ended(None)
    ledger.enter_event("b", event("ended"))
    assert ledger.all_ended(("a", "b"))
    ledger.enter_event("a", event("state", seq=1, state="running"))
    assert not ledger.all_ended(None)


def test_a_publisher_that_invents_without_end_takes_no_memory_without_end():
    ledger = LossTracker()

    def invent(start):
        for number in range(start, start + 5000):
            publisher, source = f"{number:016x}", f"cam{number}"
            ledger.enter_instances(source, instances(number, publisher))
            ledger.enter_instances("cam1", instances(number, publisher))
            ledger.enter_event("cam1", event(f"event{number}", seq=number))
            ledger.enter_event(source, event("state", state=f"state{number}", publisher=publisher))
            names = [f"label{number}.{i}" for i in range(10)]
            ledger.enter_event(
                "cam1",
                event("labels", seq=number, publisher=publisher, id=f"{number}", names=names),
            )

    invent(0)
    tracemalloc.start()
    try:
        invent(5000)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 3_000_000  # what is kept was replaced; 5000 more of each would be 9 MB
    assert len(ledger.states()) <= losses_module.MOST_SOURCES


def test_who_is_heard_often_is_not_forgotten_for_those_that_are_invented():
    ledger = LossTracker()
    ledger.enter_event("cam1", event("state", state="running"))
    for number in range(5000):
        assert ledger.enter_instances("cam1", instances(2 * number)).lost == bool(number)
        ledger.enter_instances(f"x{number}", instances(0))
    assert ledger.states() == {"cam1": "running"}
    assert ledger.tally.lost == 4999
