"""The mailbox of each browser, which holds what is to be sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import pytest

from maskcast.pipeline.clients.view.feed import MAX_IN_FLIGHT, Mailbox
from maskcast.pipeline.clients.view.packet import Packet

T = TypeVar("T")


class Numbered:
    """Stands for a packet."""

    def __init__(self, source: str, number: int) -> None:
        self.source, self.number = source, number


def put(mailbox: Mailbox, source: str, number: int) -> None:
    mailbox.put_packet(cast("Packet", Numbered(source, number)))


async def within(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, 60)


async def take(mailbox: Mailbox) -> Any:
    return await within(mailbox.take())


async def is_empty(mailbox: Mailbox) -> bool:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(mailbox.take(), 0.02)
    return True


def test_a_newer_frame_replaces_one_of_its_source_that_waits() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        for number in range(5):
            put(mailbox, "door", number)
        put(mailbox, "desk", 7)
        assert (await take(mailbox)).number == 4
        assert (await take(mailbox)).number == 7
        assert await is_empty(mailbox)

    asyncio.run(scenario())


def test_a_browser_gets_no_more_frames_than_it_acknowledges() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        for number in range(MAX_IN_FLIGHT):
            put(mailbox, "door", number)
            await take(mailbox)
        put(mailbox, "door", 98)
        assert await is_empty(mailbox)
        put(mailbox, "desk", 1)  # another source is not delayed
        assert (await take(mailbox)).source == "desk"
        mailbox.acknowledge("nobody")
        assert await is_empty(mailbox)
        put(mailbox, "door", 99)
        mailbox.acknowledge("door")
        assert (await take(mailbox)).number == 99
        for _ in range(10):  # more than were sent: they count for nothing
            mailbox.acknowledge("door")
        for number in range(MAX_IN_FLIGHT):
            put(mailbox, "door", number)
            await take(mailbox)
        put(mailbox, "door", 100)
        assert await is_empty(mailbox)

    asyncio.run(scenario())


def test_states_overtake_frames_and_are_kept_per_source() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        put(mailbox, "door", 1)
        assert cast("Any", await within(waiting)).number == 1
        put(mailbox, "door", 2)
        mailbox.put_text("door", "stalled")
        mailbox.put_text("door", "streaming")
        mailbox.put_text("desk", "ended")
        assert [await take(mailbox) for _ in range(2)] == ["streaming", "ended"]
        mailbox.discard("door")
        assert await is_empty(mailbox)

    asyncio.run(scenario())
