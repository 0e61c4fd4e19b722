from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.publisher import subscriptions
from maskcast.pipeline.publisher.subscriptions import Subscriptions

prefixes = st.binary(max_size=3).map(lambda b: bytes(c % 2 + 97 for c in b))


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), prefixes), max_size=40), topic=prefixes)
def test_a_topic_counts_the_prefixes_that_it_begins_with(steps, topic):
    found, expected = Subscriptions(), Counter()
    for comes, prefix in steps:
        if comes:
            found.add(prefix)
            expected[prefix] += 1
        elif expected[prefix]:
            found.remove(prefix)
            expected[prefix] -= 1
        assert found.count(topic) == sum(
            n for prefix, n in expected.items() if topic.startswith(prefix)
        )


def test_removing_an_unknown_prefix_removes_no_other():
    found = Subscriptions()
    found.add(b"v1/")
    found.remove(b"v1/cam1/")
    assert found.count(b"v1/cam1/instances") == 1


def test_with_too_many_prefixes_every_topic_counts_as_subscribed_until_they_are_gone(monkeypatch):
    monkeypatch.setattr(subscriptions, "MAX_PREFIXES", 10)
    found = Subscriptions()
    for number in range(1000):
        found.add(b"v1/%d/" % number)
    assert found.count(b"v1/cam1/instances") == 1
    for number in range(1000):
        found.remove(b"v1/%d/" % number)
    assert found.count(b"v1/cam1/instances") == found.count(b"v1/3/instances") == 0
