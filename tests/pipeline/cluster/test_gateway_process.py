"""The gateway's process: it is restarted when it dies, and ends with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster import gateway_process
from maskcast.pipeline.cluster.gateway import GatewayStats
from maskcast.pipeline.cluster.gateway_process import (
    GatewayProcess,
    GatewaySettings,
    ProcessReport,
)
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe

SETTINGS = GatewaySettings("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")


async def report_after(process: GatewayProcess, pid: int) -> None:
    while process.report is None or process.report.pid == pid:
        await asyncio.sleep(0.05)


def test_a_gateway_that_dies_is_back_at_the_same_addresses() -> None:
    async def run() -> None:
        process = GatewayProcess(SETTINGS)
        await process.start()
        assert process.report is not None
        first, addresses = process.report.pid, (process.endpoint, process.sources_endpoint)
        os.kill(first, signal.SIGKILL)
        await asyncio.wait_for(report_after(process, first), 120)
        assert (process.endpoint, process.sources_endpoint) == addresses
        assert process.restarts == 1
        await asyncio.to_thread(pass_a_frame, *addresses)
        await process.close()

    asyncio.run(run())


def test_half_a_line_of_a_killed_gateway_does_not_stop_its_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is a script here, which at first ends within its second report."""
    script = tmp_path / "python"
    stats = GatewayStats(0, 0, 0, 0, 0, 0, 0, {}, ())
    reports = [msgspec.json.encode(ProcessReport(pid, "a", "b", stats)).decode() for pid in (1, 2)]
    script.write_text(
        "#!/bin/sh\nread settings\n"
        f"if mkdir {tmp_path}/started; then echo '{reports[0]}'; printf '{{'; exit 9; fi\n"
        f"echo '{reports[1]}'\nexec cat\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))

    async def run() -> None:
        process = GatewayProcess(SETTINGS)
        await process.start()
        await asyncio.wait_for(report_after(process, 1), 60)
        assert process.restarts == 1
        await process.close()

    asyncio.run(run())


def pass_a_frame(endpoint: str, sources: str) -> None:
    """Publish through a gateway until a subscriber has a frame."""
    with (
        Publisher("", NAMES, gateways=[sources]) as publisher,
        subscribe(endpoint, timeout_s=0.2) as subscription,
    ):
        for index in range(600):
            publisher.publish(frame(index=index), seen())
            try:
                assert subscription.receive().source == "cam1"
            except TimeoutError:
                continue
            return
    raise AssertionError("no frame came through")


def test_an_address_in_use_is_reported_at_the_start(free_port: int) -> None:
    async def run() -> None:
        first = GatewayProcess(GatewaySettings(f"tcp://127.0.0.1:{free_port}", "tcp://127.0.0.1:*"))
        await first.start()
        with pytest.raises(InputError, match="is in use"):
            await GatewayProcess(
                GatewaySettings(f"tcp://127.0.0.1:{free_port}", "tcp://127.0.0.1:*")
            ).start()
        await first.close()

    asyncio.run(run())


def test_the_process_ends_with_its_standard_input(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/messages"
    with subprocess.Popen(
        [sys.executable, "-m", gateway_process.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f'{{"publish": "{endpoint}", "sources": "tcp://127.0.0.1:*"}}\n')
        process.stdin.flush()
        assert endpoint in process.stdout.readline()
        process.stdin.close()
        wait_until(lambda: process.poll() is not None, 60)
        assert process.returncode == 0
