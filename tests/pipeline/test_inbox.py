import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.pipeline.inbox import Inbox, InboxClosed, RoundRobin

ACTIONS = st.lists(st.sampled_from(["put", "post", "take", "discard"]), max_size=60)


@settings(max_examples=200)
@given(actions=ACTIONS, capacity=st.integers(1, 3))
def test_latest_keeps_the_newest_and_accounts_for_every_item(actions, capacity: int) -> None:
    dropped: list[tuple[int, str]] = []
    inbox: Inbox[int] = Inbox(
        capacity, "latest", on_drop=lambda item, why: dropped.append((item, why))
    )
    put: list[int] = []
    posted: list[int] = []
    taken: list[int] = []
    for number, action in enumerate(actions):
        if action == "put":
            assert inbox.put(number)
            put.append(number)
        elif action == "post":
            assert inbox.post(number)
            posted.append(number)
        elif action == "discard":
            inbox.discard()
        else:
            waiting = [item for item in put if item not in taken and item not in dict(dropped)]
            assert waiting == put[len(put) - len(waiting) :]  # what waits is what came last
            assert len(waiting) <= capacity
            taken += inbox.take(timeout_s=0)
    inbox.close()
    assert not inbox.put(-1)
    while not inbox.is_drained:
        taken += inbox.take()
    with pytest.raises(InboxClosed):
        inbox.take()
    assert taken == sorted(taken)
    assert dropped.pop() == (-1, "stopped")
    assert Counter(taken) + Counter(item for item, _ in dropped) == Counter(put + posted)
    assert not set(dict(dropped)) & set(posted)


@settings(max_examples=30, deadline=None)
@given(items=st.integers(0, 60), capacity=st.integers(1, 4), limit=st.integers(1, 5))
def test_block_loses_nothing_and_keeps_the_order(items: int, capacity: int, limit: int) -> None:
    inbox: Inbox[int] = Inbox(capacity, "block")

    def fill() -> None:
        for item in range(items):
            inbox.put(item)
            assert len(inbox) <= capacity
        inbox.close()

    thread = threading.Thread(target=fill)
    thread.start()
    taken: list[int] = []
    try:
        while True:
            batch = inbox.take(limit, alike=lambda first, other: True)
            assert 1 <= len(batch) <= limit
            taken += batch
    except InboxClosed:
        pass
    thread.join()
    assert taken == list(range(items))


def test_a_batch_ends_where_the_items_differ() -> None:
    inbox: Inbox[str] = Inbox(5)
    for item in ("a1", "a2", "b1", "a3"):
        inbox.put(item)
    same_letter = lambda first, other: first[0] == other[0]  # noqa: E731
    assert inbox.take(4, same_letter) == ["a1", "a2"]
    assert inbox.take(4, same_letter) == ["b1"]
    assert inbox.take(4, same_letter) == ["a3"]


def test_a_full_blocking_inbox_makes_its_writer_wait() -> None:
    inbox: Inbox[int] = Inbox(1)
    inbox.put(0)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (inbox.put(1), done.set()))
    thread.start()
    assert not done.wait(0.05)
    assert inbox.take() == [0]
    assert done.wait(60)
    thread.join()


def test_closing_frees_a_waiting_writer_and_drops_its_item() -> None:
    dropped: list[tuple[int, str]] = []
    inbox: Inbox[int] = Inbox(1, on_drop=lambda item, why: dropped.append((item, why)))
    inbox.put(0)
    thread = threading.Thread(target=inbox.put, args=(1,))
    thread.start()
    inbox.close()
    thread.join(60)
    assert not thread.is_alive()
    assert dropped == [(1, "stopped")]
    assert inbox.take() == [0]


def test_waiting_for_capacity_ends_with_capacity_or_the_close() -> None:
    inbox: Inbox[int] = Inbox(1)
    inbox.wait_for_capacity()
    inbox.put(0)
    waiter = threading.Thread(target=inbox.wait_for_capacity)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    inbox.take()
    waiter.join(60)
    assert not waiter.is_alive()
    inbox.put(1)
    waiter = threading.Thread(target=inbox.wait_for_capacity)
    waiter.start()
    inbox.close()
    waiter.join(60)
    assert not waiter.is_alive()


def test_taking_from_an_idle_inbox_returns_nothing_after_the_timeout() -> None:
    began_s = time.monotonic()
    assert Inbox[int]().take(timeout_s=0.05) == []
    changed = threading.Condition()
    assert RoundRobin([Inbox[int](changed=changed)], changed).take(timeout_s=0.05) == []
    assert 0.1 <= time.monotonic() - began_s < 30.0


@settings(max_examples=100)
@given(full=st.lists(st.booleans(), min_size=1, max_size=6), rounds=st.integers(1, 10))
def test_sources_that_always_have_something_are_served_in_turn(
    full: list[bool], rounds: int
) -> None:
    changed = threading.Condition()
    inboxes = [Inbox[int](changed=changed) for _ in full]
    turn = RoundRobin(inboxes, changed)
    served: Counter[int] = Counter()
    for _ in range(rounds * sum(full)):
        for place, is_full in enumerate(full):
            if is_full and not len(inboxes[place]):
                inboxes[place].put(place)
        served.update(turn.take())
    assert all(count == rounds for count in served.values())
    assert len(served) == sum(full)


def test_the_round_ends_when_every_inbox_has() -> None:
    changed = threading.Condition()
    inboxes = [Inbox[int](changed=changed) for _ in range(3)]
    inboxes[1].put(5)
    for inbox in inboxes:
        inbox.close()
    turn = RoundRobin(inboxes, changed)
    assert turn.take() == [5]
    with pytest.raises(InboxClosed):
        turn.take()


def test_the_last_event_follows_the_items_and_is_added_once() -> None:
    inbox: Inbox[str] = Inbox(2)
    inbox.put("frame")
    inbox.close("ended")
    inbox.close("ended again")
    assert not inbox.post("too late")
    assert [inbox.take(), inbox.take()] == [["frame"], ["ended"]]
    assert inbox.is_drained


def test_closing_may_discard_all_but_events() -> None:
    dropped: list[tuple[str, str]] = []
    inbox: Inbox[str] = Inbox(2, on_drop=lambda *drop: dropped.append(drop))
    inbox.put("frame")
    inbox.post("event")
    inbox.close("ended", discard=True)
    assert [inbox.take(), inbox.take()] == [["event"], ["ended"]]
    assert dropped == [("frame", "stopped")]


def test_a_round_may_stay_open_for_inboxes_that_come_later() -> None:
    changed = threading.Condition()
    turn: RoundRobin[int] = RoundRobin([], changed, open_end=True)
    assert turn.take(timeout_s=0.01) == []
    for number in range(3):
        inbox = Inbox[int](changed=changed)
        inbox.close(number)
        threading.Timer(0.02, turn.add, (inbox,)).start()
        assert turn.take(timeout_s=60) == [number]
    assert turn.take(timeout_s=0.01) == []
    threading.Timer(0.02, turn.close).start()
    with pytest.raises(InboxClosed):
        turn.take(timeout_s=60)
    assert not turn.add(Inbox[int](changed=changed))


def test_an_event_may_be_added_to_a_closed_inbox() -> None:
    changed = threading.Condition()
    inbox = Inbox[str](changed=changed)
    turn = RoundRobin([inbox], changed, open_end=True)
    inbox.put("frame")
    inbox.close("ended")
    for waits in (True, False):
        if not waits:
            assert [turn.take(timeout_s=0) for _ in range(4)][-1] == []
        inbox.add_last("removed")
        turn.add(inbox)
    assert turn.take() == ["removed"]
    assert turn.take(timeout_s=0) == []


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["come", "go", "serve"]), min_size=5, max_size=60),
    first=st.integers(1, 4),
)
def test_inboxes_are_served_in_turn_while_others_are_added_and_removed(steps, first: int) -> None:
    changed = threading.Condition()
    inboxes = {number: Inbox[int](changed=changed) for number in range(first)}
    turn = RoundRobin(list(inboxes.values()), changed, open_end=True)
    since_served = dict.fromkeys(inboxes, 0)
    for number, step in enumerate(steps, start=first):
        if step == "come":
            inboxes[number], since_served[number] = Inbox[int](changed=changed), 0
            turn.add(inboxes[number])
        elif step == "go" and len(inboxes) > 1:
            gone = number % len(inboxes)
            name = list(inboxes)[gone]
            inboxes.pop(name).close(discard=True)
            since_served.pop(name)
        else:
            for name, inbox in inboxes.items():
                if not len(inbox):
                    inbox.put(name)
            (served,) = turn.take()
            for name in since_served:
                since_served[name] += 1
            since_served[served] = 0
        most = max(since_served.values(), default=0)
        assert most <= first + steps.count("come")  # never passed over for a whole round
