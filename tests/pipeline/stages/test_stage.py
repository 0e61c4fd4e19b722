import threading
import time
from collections.abc import Iterator

import pytest

from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.orders import Failed, Order, StageEnded
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.stats import Meter


class Doubling(Stage[int, int]):
    """Doubles numbers; fails at 13."""

    batch_size = 3

    def __init__(self, inbox: Inbox, outbox: Inbox | None) -> None:
        self.orders: list[Order] = []
        self.batches: list[list[int]] = []
        self.calls: list[str] = []
        context = PipelineContext(
            Meter([]), self.orders.append, threading.Event(), lambda frame: True
        )
        super().__init__("doubling", inbox, outbox, context)

    def open(self) -> None:
        self.calls.append(f"open on {threading.current_thread().name}")

    def work(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]

    def alike(self, first: int, other: int) -> bool:
        return first % 2 == other % 2

    def close(self) -> None:
        self.calls.append(f"close on {threading.current_thread().name}")


@pytest.fixture
def inbox() -> Inbox:
    return Inbox(10)


def taken(outbox: Inbox) -> Iterator[object]:
    while not outbox.is_drained:
        yield from outbox.take()


def test_events_stay_between_the_items_they_came_between(inbox: Inbox) -> None:
    outbox: Inbox = Inbox(10)
    event = Event("cam", "state", {"state": "running"})
    for item in (1, 3, 2, event, 4, 5):
        (inbox.post if item is event else inbox.put)(item)
    inbox.close(Event("cam", "ended"))
    stage = Doubling(inbox, outbox)
    stage.start()
    stage.join(60)
    assert list(taken(outbox)) == [2, 6, 4, event, 8, 10, Event("cam", "ended")]
    assert stage.batches == [[1, 3], [2], [4], [5]]
    assert stage.orders == [StageEnded()]
    assert stage.calls == ["open on doubling", "close on doubling"]


def test_nothing_is_taken_before_the_next_inbox_has_capacity(inbox: Inbox) -> None:
    outbox: Inbox = Inbox(1)
    outbox.put(0)
    inbox.put(1)
    stage = Doubling(inbox, outbox)
    stage.start()
    stage.join(0.1)
    assert len(inbox) == 1
    assert outbox.take() == [0]
    assert outbox.take(timeout_s=60) == [2]
    inbox.close()
    stage.join(60)
    assert not stage.is_alive()


def test_an_error_is_reported_once_and_the_next_inbox_stays_open(inbox: Inbox) -> None:
    outbox: Inbox = Inbox(10)
    inbox.put(13)
    stage = Doubling(inbox, outbox)
    stage.start()
    stage.join(60)
    failed, end = stage.orders
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ValueError)
    assert end == StageEnded()
    # If it were closed here, the end would overtake the reason why each source ends.
    assert outbox.put(1)
    assert stage.calls[-1] == "close on doubling"


def test_the_time_that_a_stage_has_been_at_work_is_known_while_it_works() -> None:
    class Hanging(Doubling):
        let_go = threading.Event()

        def work(self, items: list[int]) -> list[int]:
            self.let_go.wait(60)
            return items

    inbox, outbox = Inbox[int](10), Inbox[int](10)
    stage = Hanging(inbox, outbox)
    stage.start()
    assert stage.at_work_s is None
    inbox.put(1)
    while (at_work_s := stage.at_work_s) is None or at_work_s < 0.1:
        time.sleep(0.01)
    assert at_work_s < 30
    stage.let_go.set()
    assert outbox.take(timeout_s=60) == [1]
    inbox.close()
    stage.join(60)
    assert stage.at_work_s is None
