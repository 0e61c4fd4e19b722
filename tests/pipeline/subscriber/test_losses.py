import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.subscriber import losses as losses_module
from maskcast.pipeline.subscriber.losses import LossTracker, SequenceGap
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
    tracker, arrived = LossTracker(), sorted(arrived)
    gaps = [tracker.add_instances("cam1", instances(seq)) for seq in arrived]
    assert gaps[0] == SequenceGap(0, restarted=False)
    assert tracker.tally.received == len(arrived)
    assert tracker.tally.received + tracker.tally.lost == arrived[-1] - arrived[0] + 1
    assert sum(gap.lost for gap in gaps) == tracker.tally.lost


def test_losses_are_kept_apart_by_source():
    tracker = LossTracker()
    for source, seq in (("a", 0), ("b", 7), ("a", 1), ("b", 8)):
        assert tracker.add_instances(source, instances(seq)).lost == 0
    assert tracker.add_instances("a", instances(4)).lost == 2


def test_a_restarted_publisher_is_reported_once_and_nothing_is_lost():
    tracker = LossTracker()
    tracker.add_instances("cam1", instances(100))
    assert tracker.add_instances("cam1", instances(0, B)) == SequenceGap(0, restarted=True)
    assert tracker.add_instances("cam1", instances(1, B)) == SequenceGap(0, restarted=False)
    assert tracker.tally.lost == 0


def test_a_message_that_comes_twice_counts_once():
    tracker = LossTracker()
    tracker.add_instances("cam1", instances(3))
    assert tracker.add_instances("cam1", instances(3)) is None
    assert tracker.add_instances("cam1", instances(4)).lost == 0
    assert (tracker.tally.received, tracker.tally.duplicate) == (2, 1)


def test_the_messages_lost_before_an_event_are_counted():
    tracker = LossTracker()
    tracker.add_instances("cam1", instances(0))
    assert tracker.add_event("cam1", event("ended", sent=5)).lost == 4
    assert tracker.tally.lost == 4
    assert tracker.add_instances("cam1", instances(5)).lost == 0


def test_an_event_that_is_sent_again_is_ignored():
    tracker = LossTracker()
    assert tracker.add_event("cam1", event("state", seq=4, state="running")) is not None
    assert tracker.add_event("cam1", event("labels", seq=0, id="x", names=["n"])) is not None
    assert tracker.add_event("cam1", event("state", seq=4, state="running")) is None
    assert tracker.add_event("cam1", event("state", seq=5, state="lost")) is not None
    assert tracker.states() == {"cam1": "lost"}


def test_label_names_are_known_by_their_id():
    tracker = LossTracker()
    tracker.add_event("cam1", event("labels", id="0a", names=["background", "cat"]))
    tracker.add_event("cam1", event("labels", seq=1, id="0b", names="nonsense"))
    assert tracker.label_names("0a") == ("background", "cat")
    assert tracker.label_names("0b") == ()


def test_all_have_ended_when_each_subscribed_source_has():
    tracker = LossTracker()
    assert not tracker.all_ended(None)
    tracker.add_event("a", event("ended"))
    assert tracker.all_ended(None)
    assert tracker.all_ended(("a",))
    assert not tracker.all_ended(("a", "b"))
    tracker.add_instances("b", instances(0))
    assert not tracker.all_ended(None)
    tracker.add_event("b", event("ended"))
    assert tracker.all_ended(("a", "b"))
    tracker.add_event("a", event("state", seq=1, state="running"))
    assert not tracker.all_ended(None)


def test_memory_is_bounded_whatever_a_publisher_invents():
    tracker = LossTracker()

    def invent(start):
        for number in range(start, start + 5000):
            publisher, source = f"{number:016x}", f"cam{number}"
            tracker.add_instances(source, instances(number, publisher))
            tracker.add_instances("cam1", instances(number, publisher))
            tracker.add_event("cam1", event(f"event{number}", seq=number))
            tracker.add_event(source, event("state", state=f"state{number}", publisher=publisher))
            names = [f"label{number}.{i}" for i in range(10)]
            tracker.add_event(
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
    assert len(tracker.states()) <= losses_module.MAX_SOURCES


def test_a_frequent_source_is_not_forgotten_for_invented_ones():
    tracker = LossTracker()
    tracker.add_event("cam1", event("state", state="running"))
    for number in range(5000):
        assert tracker.add_instances("cam1", instances(2 * number)).lost == bool(number)
        tracker.add_instances(f"x{number}", instances(0))
    assert tracker.states() == {"cam1": "running"}
    assert tracker.tally.lost == 4999


def test_the_end_of_a_former_publisher_does_not_end_a_source_that_has_moved():
    tracker = LossTracker()
    tracker.add_instances("cam1", instances(0))
    tracker.add_event("cam1", event("labels", publisher=B, id="x", names=["n"]))
    tracker.add_event("cam1", event("ended"))
    assert not tracker.all_ended(None)
    assert tracker.add_instances("cam1", instances(0, B)) == SequenceGap(0, restarted=True)
    tracker.add_event("cam1", event("ended", publisher=B))
    assert tracker.all_ended(None)
    tracker.add_instances("cam1", instances(1))
    assert tracker.all_ended(None)
