"""A placed source whose worker fails in unusual ways; test_cluster_command.py has real clusters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from maskcast.pipeline.cluster.placed_source import PlacedSource
from maskcast.pipeline.cluster.worker import WorkerReport
from maskcast.pipeline.configuration.config import Config, SourceConfig
from maskcast.pipeline.control.messages import Placement


class FakeActor:
    """Runs a source until ``failing`` is called, which raises."""

    def __init__(self, failing: str = "", has_ended: bool = True) -> None:
        self.calls: list[str] = []
        self.is_alive = True
        self._failing, self._has_ended = failing, has_ended

    async def call(self, method: str, *_: object) -> Any:
        self.calls.append(method)
        if method == self._failing:
            raise ValueError("something unexpected")
        if method == "place":
            return "node", 1
        if method == "report":
            await asyncio.sleep(0.001)
            return WorkerReport(source=None)
        return self._has_ended if method in ("stop", "remove", "hand_over") else None

    def kill(self, *, restart: bool = False) -> None:
        self.is_alive = restart


class FakeCluster:
    def __init__(self, *actors: FakeActor) -> None:
        self._actors = list(actors)

    def place(self, node: str | None = None) -> FakeActor:
        return self._actors.pop(0)


def run_source(cluster: FakeCluster) -> PlacedSource:
    config = Config(sources=[SourceConfig(url="test://", name="cam1")])
    return PlacedSource(cluster, "cam1", config)  # type: ignore[arg-type]


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("order", ["stop", "remove"])
def test_a_source_ends_even_if_its_worker_fails_to(order: Any, caplog) -> None:
    actor = FakeActor(failing=order)

    async def scenario() -> None:
        source = run_source(FakeCluster(actor))
        await until(lambda: source.placement is Placement.RUNNING)
        assert not await source.end(order)

    asyncio.run(scenario())
    assert actor.calls[-1] == order
    assert not actor.is_alive
    assert caplog.messages.count("source_failed") == 1


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_source_knows_whether_its_worker_has_published_the_end(has_ended: bool) -> None:
    actor = FakeActor(has_ended=has_ended)

    async def scenario() -> None:
        source = run_source(FakeCluster(actor))
        await until(lambda: source.placement is Placement.RUNNING)
        assert await source.end("remove") is has_ended

    asyncio.run(scenario())
    assert actor.calls[-1] == "remove"
    assert not actor.is_alive


def test_a_worker_that_fails_to_hand_over_is_ended_and_its_successor_runs(caplog) -> None:
    previous, successor = FakeActor(failing="hand_over"), FakeActor()

    async def scenario() -> None:
        source = run_source(FakeCluster(previous, successor))
        await until(lambda: source.placement is Placement.RUNNING)
        source.move("other")
        await until(lambda: "report" in successor.calls)
        assert source.placement is Placement.RUNNING
        assert not previous.is_alive
        assert successor.is_alive
        await source.end("stop")

    asyncio.run(scenario())
    assert caplog.messages.count("source_failed") == 1
