from maskcast.pipeline.publisher import grants as grants_module
from maskcast.pipeline.publisher.grants import Grants

ANNA, BERT = b"anna", b"bert"


def test_subscriptions_are_counted_once_for_each_connection_until_it_is_gone():
    grants = Grants()
    for handle in (7, 8):
        grants.open(handle)
        assert grants.add(handle, b"v1/door/")
        assert grants.add(handle, b"v1/door/")
    assert grants.count(b"v1/door/event") == 2
    grants.remove(7, b"v1/door/")
    grants.remove(7, b"v1/door/")
    assert grants.count(b"v1/door/event") == 1
    grants.close(8)
    grants.close(8)
    assert grants.count(b"v1/door/event") == 0
    assert grants.prefixes() == set()


def test_a_message_of_a_connection_that_is_gone_grants_nothing():
    grants = Grants()
    grants.open(7)
    grants.close(7)
    grants.identify(7, ANNA)
    assert grants.handles({ANNA}) == []
    assert not grants.add(7, b"v1/")
    assert grants.count(b"v1/door/event") == 0


def test_a_descriptor_that_is_used_again_belongs_to_every_client_identified_on_it():
    grants = Grants()
    grants.open(7)
    grants.identify(7, ANNA)
    grants.add(7, b"v1/")
    grants.open(7)
    assert grants.count(b"v1/door/event") == 0
    assert grants.handles({ANNA}) == []
    grants.identify(7, BERT)
    grants.identify(7, ANNA)  # read late
    assert grants.handles({ANNA}) == grants.handles({BERT}) == [7]
    assert grants.handles(set()) == []


def test_the_memory_of_one_connection_is_bounded(monkeypatch):
    monkeypatch.setattr(grants_module, "MAX_GRANTED", 10)
    grants = Grants()
    grants.open(7)
    added = [grants.add(7, b"v1/%d" % number) for number in range(100)]
    assert added.count(True) == 10
    assert len(grants.prefixes()) == 10
