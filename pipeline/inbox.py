"""Inbox: a bounded queue with a policy for when it is full."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from maskcast.pipeline.configuration.config import Policy

T = TypeVar("T")


class InboxClosed(Exception):  # noqa: N818 - an end, not an error
    """The inbox is closed and empty."""


class Inbox(Generic[T]):
    """A bounded queue between two threads.

    With the policy ``block``, ``put`` waits while the inbox is full. With ``latest``, it replaces
    the oldest item, so that the item that is taken is recent. Every item that is put is either
    taken or passed to ``on_drop``, once.

    Args:
        capacity: maximum number of waiting items.
        policy: what ``put`` does when the inbox is full.
        on_drop: called with an item that is dropped and the reason, ``replaced`` or ``stopped``, on
            the thread that caused it, outside of all locks.
        changed: the condition to wait on; all inboxes of a ``RoundRobin`` share one. Its lock must
            be re-entrant, as it is by default: ``RoundRobin`` takes from an inbox under it.
    """

    def __init__(
        self,
        capacity: int = 1,
        policy: Policy = "block",
        on_drop: Callable[[T, str], None] | None = None,
        changed: threading.Condition | None = None,
    ) -> None:
        self.capacity = capacity
        self.policy = policy
        self._on_drop = on_drop
        self._changed = changed or threading.Condition()
        self._items: deque[tuple[T, bool]] = deque()  # (item, may it be dropped)
        self._droppable = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def waiting(self) -> int:
        """Number of waiting items, events not counted."""
        return self._droppable

    @property
    def is_drained(self) -> bool:
        """Whether it is closed and empty."""
        return self._closed and not self._items

    def put(self, item: T) -> bool:
        """Add an item by the policy. Return False if the inbox is closed and drops the item."""
        dropped: T | None = None
        reason = "replaced"
        with self._changed:
            if self.policy == "block":
                self._changed.wait_for(lambda: self._closed or self._droppable < self.capacity)
            accepted = not self._closed
            if not accepted:
                dropped, reason = item, "stopped"
            else:
                if self._droppable >= self.capacity:
                    dropped = self._remove_oldest()
                self._add(item, droppable=True)
        if dropped is not None and self._on_drop is not None:
            self._on_drop(dropped, reason)
        return accepted

    def post(self, item: T) -> bool:
        """Add an event, which needs no capacity and is never dropped. Return False if closed."""
        with self._changed:
            if self._closed:
                return False
            self._add(item, droppable=False)
            return True

    def take(
        self,
        limit: int = 1,
        alike: Callable[[T, T], bool] | None = None,
        timeout_s: float | None = None,
    ) -> list[T]:
        """Wait for an item; return it and the items directly behind it that are ``alike``.

        Never waits for a second item. Returns an empty list after ``timeout_s``.

        Raises:
            InboxClosed: closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed, timeout_s)
            if not self._items:
                if self._closed:
                    raise InboxClosed
                return []
            taken = [self._pop()]
            while (
                alike and self._items and len(taken) < limit and alike(taken[0], self._items[0][0])
            ):
                taken.append(self._pop())
            self._changed.notify_all()
            return taken

    def wait_for_capacity(self) -> None:
        """Wait until ``put`` would return at once."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._droppable < self.capacity)

    def add_last(self, item: T) -> None:
        """Add an event at the end, even if the inbox is closed."""
        with self._changed:
            self._add(item, droppable=False)

    def set_policy(self, policy: Policy) -> None:
        """Change what a full inbox does; with ``latest`` at most one item waits."""
        with self._changed:
            self.policy = policy
            self.capacity = 1 if policy == "latest" else self.capacity
            self._changed.notify_all()

    def close(self, last: T | None = None, *, discard: bool = False) -> bool:
        """Accept no more items; waiting ones can still be taken. Return False if already closed.

        Args:
            last: an event that is added as the last item, unless the inbox is closed already.
            discard: drop the waiting items, except events.
        """
        with self._changed:
            first_time = not self._closed
            dropped = self._remove_droppable() if discard else []
            if last is not None and first_time:
                self._add(last, droppable=False)
            self._closed = True
            self._changed.notify_all()
        self._drop(dropped)
        return first_time

    def discard(self) -> None:
        """Drop the waiting items, except events."""
        with self._changed:
            dropped = self._remove_droppable()
            self._changed.notify_all()
        self._drop(dropped)

    def _drop(self, items: list[T]) -> None:
        if self._on_drop is not None:
            for item in items:
                self._on_drop(item, "stopped")

    def _remove_droppable(self) -> list[T]:
        dropped = [item for item, droppable in self._items if droppable]
        self._items = deque(entry for entry in self._items if not entry[1])
        self._droppable = 0
        return dropped

    def _add(self, item: T, *, droppable: bool) -> None:
        self._items.append((item, droppable))
        self._droppable += droppable
        self._changed.notify_all()

    def _pop(self) -> T:
        item, droppable = self._items.popleft()
        self._droppable -= droppable
        return item

    def _remove_oldest(self) -> T:
        oldest = next(index for index, (_, droppable) in enumerate(self._items) if droppable)
        item, _ = self._items[oldest]
        del self._items[oldest]
        self._droppable -= 1
        return item


class RoundRobin(Generic[T]):
    """Takes from several inboxes in turn, so that a busy source does not starve the others.

    Inboxes may be added at any time; one that is closed and empty is removed. All must share
    ``changed``.

    Args:
        inboxes: the first ones.
        changed: the condition that all inboxes share.
        open_end: when all are closed and empty, wait for further ones, until ``close``.
        is_held: while it returns True, nothing is taken from inboxes with the policy ``block``. It
            is called under ``changed`` and evaluated again when that is notified.
    """

    def __init__(
        self,
        inboxes: Sequence[Inbox[T]],
        changed: threading.Condition,
        *,
        open_end: bool = False,
        is_held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._inboxes = list(inboxes)
        self._changed = changed
        self._open_end = open_end
        self._is_held = is_held
        self._is_over = False
        self._next = 0

    def add(self, inbox: Inbox[T]) -> bool:
        """Add an inbox, or one that was removed. Return False if the end was reached already."""
        with self._changed:
            if not self._is_over and inbox not in self._inboxes:
                self._inboxes.append(inbox)
                self._changed.notify_all()
            return not self._is_over

    def close(self) -> None:
        """End when all inboxes are closed and empty."""
        with self._changed:
            self._open_end = False
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Number of waiting items in all inboxes, events not counted."""
        return sum(inbox.waiting for inbox in self._inboxes)

    def take(
        self,
        limit: int = 1,
        alike: Callable[[T, T], bool] | None = None,
        timeout_s: float | None = None,
    ) -> list[T]:
        """Take from the next inbox that is not empty, starting after the last one taken from.

        Arguments as in ``Inbox.take``.

        Raises:
            InboxClosed: all are closed and empty, and none is expected (``open_end``).
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._remove_drained()
                for step in range(len(self._inboxes)):
                    index = (self._next + step) % len(self._inboxes)
                    inbox = self._inboxes[index]
                    if len(inbox) and not self._holds(inbox):
                        self._next = index + 1
                        # Acquires ``changed`` a second time: a Condition's own lock is re-entrant.
                        return inbox.take(limit, alike)
                if not self._inboxes and not self._open_end:
                    self._is_over = True
                    raise InboxClosed
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return []
                self._changed.wait(left_s)

    def _holds(self, inbox: Inbox[T]) -> bool:
        """Tell whether the items of an inbox are held; events alone never are."""
        return inbox.policy == "block" and inbox.waiting > 0 and self._is_held()

    def _remove_drained(self) -> None:
        """Remove inboxes that are closed and empty; the order of the others does not change."""
        if any(inbox.is_drained for inbox in self._inboxes):
            before = [inbox for inbox in self._inboxes[: self._next] if not inbox.is_drained]
            after = [inbox for inbox in self._inboxes[self._next :] if not inbox.is_drained]
            self._inboxes, self._next = [*before, *after], len(before)
