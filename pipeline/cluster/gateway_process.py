"""GatewayProcess: a gateway in a process of its own, which is restarted when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from contextlib import suppress

import msgspec

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.gateway import Gateway, GatewayStats
from maskcast.pipeline.configuration.config import CurveConfig
from maskcast.pipeline.log import configure, fields
from maskcast.pipeline.parent import on_parent_exit
from maskcast.pipeline.sources.backoff import Backoff
from maskcast.pipeline.wire.rights import EVERYTHING
from maskcast.pipeline.wire.server_keys import ServerKeys

REPORT_EVERY_S = 1.0

_END_WITHIN_S = 10.0
"""The process is killed after this time; it needs less than a second, but not on a busy machine."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
_MAX_LINE_BYTES = 16 << 20

_logger = logging.getLogger(__name__)


class GatewaySettings(msgspec.Struct, frozen=True):
    """The settings of a gateway process, sent as one line of JSON to its standard input.

    Attributes:
        publish: the endpoint for subscribers.
        sources: the endpoint for workers.
        curve: the keys; workers use the gateway's own key pair.
    """

    publish: str
    sources: str
    curve: CurveConfig | None = None


class ProcessReport(msgspec.Struct, frozen=True):
    """A report of a gateway process, one line of JSON each second on its standard output.

    Attributes:
        pid: its process id.
        endpoint: the bound endpoint for subscribers.
        sources_endpoint: the bound endpoint for workers.
        stats: its figures.
    """

    pid: int
    endpoint: str
    sources_endpoint: str
    stats: GatewayStats


class GatewayProcess:
    """Keeps a gateway running. Lives in the supervisor's loop.

    The gateway's process ends when its standard input is closed, and so also when this process
    dies.

    Args:
        settings: endpoints and keys. Ports that the system chooses are kept on a restart.

    Attributes:
        report: the last report; None while there is no process.
        restarts: number of times it was restarted.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self.report: ProcessReport | None = None
        self.restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def sources_endpoint(self) -> str:
        """The endpoint that workers connect to."""
        return self._settings.sources

    @property
    def endpoint(self) -> str:
        """The endpoint for subscribers."""
        return self._settings.publish

    async def start(self) -> None:
        """Start it, and keep it running from now on.

        Raises:
            InputError: an endpoint cannot be bound, or a key cannot be read.
        """
        await self._launch()
        self._task = asyncio.create_task(self._keep(), name="gateway")

    async def close(self) -> None:
        """End the process; queued messages are sent."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if (process := self._process) is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _END_WITHIN_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _keep(self) -> None:
        backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        while True:
            assert self._process is not None
            assert self._process.stdout is not None
            while line := await self._process.stdout.readline():
                with suppress(msgspec.MsgspecError):  # a killed process may leave half a line
                    self.report = msgspec.json.decode(line, type=ProcessReport)
                    backoff.reset()
            self.report = None
            code = await self._process.wait()
            _logger.warning("gateway_lost", extra=fields(endpoint=self.endpoint, code=code))
            while True:
                await asyncio.sleep(backoff.next_s())
                with suppress(InputError, OSError):  # the port or memory may not be free yet
                    await self._launch()
                    break
            self.restarts += 1

    async def _launch(self) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # not reached by Ctrl-C: the supervisor ends it last
            limit=_MAX_LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(self._settings) + b"\n")
        first = await process.stdout.readline()
        try:
            self.report = msgspec.json.decode(first, type=ProcessReport)
        except msgspec.MsgspecError:
            await process.wait()
            problem = first.decode(errors="replace").strip() or "the gateway has ended at its start"
            raise InputError(problem) from None
        self._settings = msgspec.structs.replace(
            self._settings,
            publish=self.report.endpoint,
            sources=self.report.sources_endpoint,
        )
        shown = fields(endpoint=self.endpoint, pid=self.report.pid)
        _logger.info("gateway_started", extra=shown)


def main() -> None:
    """Run a gateway until standard input is closed."""
    configure("info")
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=GatewaySettings)
    try:
        gateway = make_gateway(settings)
        gateway.start()
    except InputError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(2)
    over = threading.Event()
    on_parent_exit(over.set)
    while True:
        report = ProcessReport(
            os.getpid(), gateway.endpoint, gateway.sources_endpoint, gateway.stats()
        )
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()
        if over.wait(REPORT_EVERY_S) or gateway.wait(0):
            break
    gateway.stop()


def make_gateway(settings: GatewaySettings) -> Gateway:
    """Make the gateway of a cluster: workers use its own key pair, subscribers an allowed one.

    Raises:
        InputError: a key cannot be read.
    """
    keys = source_keys = None
    if (curve := settings.curve) is not None:
        if curve.allowed_clients is None:
            raise InputError(
                "publish.curve.allowed_clients: missing; give the subscribers' .key files"
            )
        keys = ServerKeys.read(curve.secret_key, curve.allowed_clients)
        source_keys = ServerKeys(keys.own, {keys.own.public: EVERYTHING}, purpose="publish")
    return Gateway(settings.publish, settings.sources, keys=keys, source_keys=source_keys)


if __name__ == "__main__":
    main()
