from maskcast.pipeline.wire.kept import KeptEvents
from maskcast.pipeline.wire.message import EventHeader, EventMessage, decode_header, encode

A, B = "a" * 16, "b" * 16


def keep(kept, source, name, publisher=A, seq=0, **data):
    header = EventHeader(publisher=publisher, seq=seq, publish_ns=0, event=name, data=data)
    kept.add(source, header, encode(EventMessage(source, header)))


def names(kept, *prefixes):
    decoded = map(decode_header, kept.messages(prefixes or (b"",)))
    return [(source, header.event, header.publisher[0]) for source, header in decoded]


def test_the_last_event_of_each_kind_is_kept_and_ended_sources_come_last():
    kept = KeptEvents()
    keep(kept, "a", "ended")
    keep(kept, "b", "state", state="connecting")
    keep(kept, "b", "state", seq=1, state="streaming")
    keep(kept, "b", "zone_entered", seq=2)
    assert names(kept) == [("b", "state", "a"), ("a", "ended", "a")]
    assert names(kept, b"v1/a/") == [("a", "ended", "a")]
    assert kept.states() == {"a": "ended", "b": "streaming"}


def test_a_source_that_moved_is_described_by_its_newest_publisher():
    kept = KeptEvents()
    keep(kept, "cam", "size", width=1, height=1)
    keep(kept, "cam", "state", B, state="streaming")
    keep(kept, "cam", "ended", A, seq=1)
    assert names(kept) == [("cam", "state", "b")]


def test_a_removed_source_is_not_kept_until_it_is_back():
    kept = KeptEvents()
    keep(kept, "cam", "state", state="streaming")
    keep(kept, "cam", "ended", seq=1, reason="removed")
    assert names(kept) == []
    keep(kept, "cam", "state", seq=2, state="connecting")
    assert names(kept) == [("cam", "state", "a")]


def test_no_more_sources_than_allowed_are_kept():
    kept = KeptEvents(max_sources=10)
    for number in range(100):
        keep(kept, f"x{number}", "state", state="streaming")
    assert len(kept.states()) == 10
    assert "x99" in kept.states()
