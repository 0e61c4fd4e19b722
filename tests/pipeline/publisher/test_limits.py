from maskcast.pipeline.publisher import limits
from maskcast.pipeline.publisher.limits import AddressLimits


def test_a_subscriber_with_thousands_of_subscriptions_and_heartbeats_stays_within_its_limits():
    found = AddressLimits()
    assert found.connect("a", 0)
    assert found.receive("a", 4096 * 70, 0) == "ok"
    assert all(found.receive("a", 1000, second) == "ok" for second in range(3600))


def test_hundreds_of_subscribers_on_one_host_stay_within_its_limits():
    found = AddressLimits()
    assert all(found.connect("a", 0) for _ in range(300))
    assert found.receive("a", 300 * 2000, 1) == "ok"
    assert all(found.receive("a", 300 * 150, second) == "ok" for second in range(1, 3600))


def test_a_flood_blocks_its_address_for_longer_each_time_and_no_other():
    found = AddressLimits()
    assert found.connect("a", 0)
    blocked_s, now_s = [], 0.0
    for _ in range(8):
        assert found.receive("a", 100 << 20, now_s) == "flood"
        assert found.receive("a", 1, now_s) == "blocked"
        began_s = now_s
        while not found.connect("a", now_s):
            found.disconnect("a", 0, now_s)
            now_s += 0.5
        blocked_s.append(now_s - began_s)
        assert found.connect("b", now_s)
    assert blocked_s == [1, 2, 4, 8, 16, 32, 60, 60]


def test_an_address_that_reconnects_ten_times_a_second_is_unstable():
    found = AddressLimits()
    found.connect("a", 0)
    assert not any(found.disconnect("calm", 0.1, number * 60.0) for number in range(100))
    assert not any(found.disconnect("long", 3.0, 7.0) for number in range(300))
    verdicts = [found.disconnect("a", 0.01, number / 10) for number in range(150)]
    assert not verdicts[20]
    assert verdicts[-1]


def test_addresses_are_bounded(monkeypatch):
    monkeypatch.setattr(limits, "MAX_ADDRESSES", 10)
    found = AddressLimits()
    found.connect("stays", 0)
    for number in range(1000):
        found.connect(f"{number}", 0)
        found.disconnect(f"{number}", 0, 0)
    assert len(found._addresses) <= 11
    assert "stays" in found._addresses
