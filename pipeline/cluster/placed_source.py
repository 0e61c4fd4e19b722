"""PlacedSource: keeps one source running on a node, and replaces its worker if that is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Literal

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.ray_cluster import (
    Actor,
    ClusterLostError,
    RayCluster,
    WorkerLostError,
)
from maskcast.pipeline.cluster.worker import END_WITHIN_S, WorkerReport
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.control.messages import NOT_MOVED, Placement
from maskcast.pipeline.log import fields
from maskcast.pipeline.sources.backoff import Backoff
from maskcast.pipeline.url import redact, shorten

REPORT_EVERY_S = 1.0
"""Interval of a worker's reports; it also reports as soon as its pipeline has ended."""

ASK_AGAIN_S = 0.2
"""Interval at which an actor is called again while Ray restarts it."""

UNPLACED_AFTER_S = 15.0
"""A source that has waited this long for a node is logged."""

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Backoff from the second failure in a row; after the first, the worker restarts at once."""

MAX_FAILURES = 5
"""After this many failures in a row, a source is set aside."""

HEALTHY_AFTER_S = 60.0
"""A worker that has run this long resets the count of failures."""

MOVE_WITHIN_S = 60.0
"""A move is abandoned if the model is not loaded on the other node within this time."""

_logger = logging.getLogger(__name__)


class PlacedSource:
    """One source of the cluster, and the actor that runs it. Lives in the supervisor's loop.

    Args:
        cluster: where it runs.
        name: the source's name.
        config: what its worker runs.

    Attributes:
        config: what its worker runs.
        source: its configuration.
        placement: its placement.
        node: the id of the node that its worker is on; "" before it has one.
        pid: the process id of its worker; 0 before it has one.
        restarts: number of restarts after a failure.
        detail: why it does not run or was not moved, one line; "" if there is no problem.
        report: the worker's last report; None before the first one.
        actor: the actor that runs it; None before the first one is created.
    """

    def __init__(self, cluster: RayCluster, name: str, config: Config) -> None:
        self._cluster, self.config = cluster, config
        self.name, self.source = name, config.sources[0]
        self.placement = Placement.PLACING
        self.node, self.pid = "", 0
        self.restarts = 0
        self.detail = ""
        self.report: WorkerReport | None = None
        self.actor: Actor | None = None
        self._running_since_s: float | None = None
        self._target: str | None = None
        self._last_order: Literal["stop", "remove"] = "stop"
        self._has_ended = False
        self._task = asyncio.create_task(self._run(), name=f"source {name}")

    def move(self, node: str) -> None:
        """Begin to move to another node; the source keeps running until the worker there is ready.

        Raises:
            InputError: it is not running, is on that node already, or is being moved.
        """
        if self.placement is not Placement.RUNNING:
            raise InputError(f"{self.name} is {self.placement}; only a running source can be moved")
        if self._target is not None:
            raise InputError(f"{self.name} is being moved already; try again later")
        if node == self.node:
            raise InputError(f"{self.name} is on that node already")
        self._target, self.detail = node, ""

    async def end(self, order: Literal["stop", "remove"]) -> bool:
        """End the worker, which publishes its last messages; return whether it has done so."""
        self._last_order = order
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        return self._has_ended

    async def _run(self) -> None:
        """Run until the source has ended or is set aside."""
        failures, backoff = 0, Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        try:
            self.actor = self._cluster.place()
            while True:
                reason = await self._run_until_failure()
                if reason is None:
                    self.placement, self.detail = Placement.ENDED, ""
                    return
                ran_s = time.monotonic() - (self._running_since_s or time.monotonic())
                if ran_s >= HEALTHY_AFTER_S:
                    failures = 0
                    backoff.reset()
                failures += 1
                self._running_since_s = None
                self.detail = reason
                if failures == MAX_FAILURES:
                    self.placement = Placement.SET_ASIDE
                    shown = fields(source=self.name, failures=failures, reason=reason)
                    _logger.error("source_set_aside", extra=shown)
                    return
                wait_s = 0.0 if failures == 1 else backoff.next_s()
                self.placement = Placement.RESTARTING
                self.restarts += 1
                shown = fields(
                    source=self.name, node=self.node[:8], reason=reason, wait_s=round(wait_s, 1)
                )
                _logger.warning("source_lost", extra=shown)
                await asyncio.sleep(wait_s)
        except ClusterLostError as error:  # the supervisor ends, too
            self.placement, self.detail = Placement.UNPLACED, str(error)
        except Exception as error:
            self.placement, self.detail = Placement.SET_ASIDE, f"{type(error).__name__}: {error}"
            _logger.exception("source_failed", extra=fields(source=self.name))
        finally:
            await self._end_worker()

    async def _run_until_failure(self) -> str | None:
        """Run the source on the actor; return why it failed, or None if the source has ended."""
        assert self.actor is not None
        try:
            self.node, self.pid = await self._wait_for_place(self.actor)
            self.placement = Placement.STARTING
            await self.actor.call("load", self.config)
            await self._start()
            while True:
                self.report = await self.actor.call("report", REPORT_EVERY_S)
                if self.report.error is not None:
                    raise InputError(self.report.error)
                if self.report.ended is not None:
                    return None
                if self._target is not None:
                    await self._move(self._target)
        except WorkerLostError as error:
            if error.permanent:
                self.actor = self._cluster.place()
            return str(error)
        except Exception as error:
            # The process lives, but its state is unknown: Ray replaces it.
            self.actor.kill(restart=True)
            text = (
                str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            )
            return shorten(redact(text))

    async def _start(self) -> None:
        assert self.actor is not None
        await self.actor.call("start")
        self.placement, self.detail = Placement.RUNNING, ""
        self._running_since_s = time.monotonic()
        shown = fields(source=self.name, node=self.node[:8], pid=self.pid)
        _logger.info("source_placed", extra=shown)

    async def _wait_for_place(self, actor: Actor) -> tuple[str, int]:
        """Wait until Ray has placed an actor; log the source if that takes long.

        Returns:
            The node's id and the process id.

        Raises:
            WorkerLostError: Ray does not restart the actor any more.
        """
        asked_s, is_logged = time.monotonic(), False
        call: asyncio.Task[tuple[str, int]] | None = None
        try:
            while True:
                call = call or asyncio.create_task(actor.call("place"))
                done, _ = await asyncio.wait({call}, timeout=REPORT_EVERY_S)
                if done:
                    try:
                        return call.result()
                    except WorkerLostError as error:
                        if error.permanent:
                            raise
                        call = None
                        await asyncio.sleep(ASK_AGAIN_S)
                if time.monotonic() - asked_s < UNPLACED_AFTER_S:
                    continue
                self.detail = await asyncio.to_thread(self._cluster.missing)
                self.placement = Placement.UNPLACED if self.detail else Placement.PLACING
                if self.detail and not is_logged:
                    is_logged = True
                    shown = fields(source=self.name, reason=self.detail)
                    _logger.warning("source_unplaced", extra=shown)
        finally:
            if call is not None:
                call.cancel()

    async def _move(self, node: str) -> None:
        """Load the model on another node, then let the worker there take over the source."""
        assert self.actor is not None
        self._target = None
        successor = self._cluster.place(node)
        try:
            async with asyncio.timeout(MOVE_WITHIN_S):
                place = await successor.call("place")
                await successor.call("load", self.config)
        except asyncio.CancelledError:
            successor.kill()
            raise
        except Exception as error:
            successor.kill()
            reason = str(error) or await asyncio.to_thread(self._cluster.missing) or "no answer"
            self.detail = f"{NOT_MOVED}{shorten(redact(reason))}"
            _logger.warning("source_not_moved", extra=fields(source=self.name, reason=reason))
            return
        previous, self.actor = self.actor, successor
        await self._end_actor(previous, "hand_over")
        self.node, self.pid = place
        _logger.info("source_moved", extra=fields(source=self.name, node=self.node[:8]))
        await self._start()

    async def _end_worker(self) -> None:
        """Let the worker publish what it has, and end its process."""
        if self.actor is None:
            return
        if self._running_since_s is not None and self.placement is not Placement.ENDED:
            self._has_ended = await self._end_actor(self.actor, self._last_order)
        else:
            self.actor.kill()

    async def _end_actor(self, actor: Actor, order: str) -> bool:
        """Give an actor its last order, and end its process; return whether its pipeline ended."""
        try:
            return bool(await asyncio.wait_for(actor.call(order), END_WITHIN_S + 1))
        except (WorkerLostError, TimeoutError):
            return False
        except Exception:
            _logger.exception("source_failed", extra=fields(source=self.name))
            return False
        finally:
            actor.kill()
