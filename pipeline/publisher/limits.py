"""AddressLimits: limits how much the peers of one address send and how often they connect."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

FLOOD_BYTES, FLOOD_BYTES_PER_PEER = 1 << 20, 16 << 10
"""An address may send this many bytes in a burst, plus this many for each of its connections."""

BYTES_PER_S, BYTES_PER_PEER_PER_S = 16 << 10, 1 << 10
"""Its allowance grows by this many bytes per second, plus this many for each of its connections.
Heartbeats need about 0.1 kB/s per peer."""

MAX_BLOCKED_S = 60.0
"""A flood blocks its address for 1 s, and each further flood for twice as long, up to this."""

FORGIVEN_AFTER_S = 600.0
"""Floods longer ago than this are not counted."""

SHORT_S = 1.0
"""A connection that lasts less than this is short."""

MAX_SHORT, SHORT_PER_S = 30, 0.5
"""An address with more short connections than this, plus this many per second, is unstable."""

MAX_ADDRESSES = 1024
"""Maximum number of addresses without a connection that are remembered."""


@dataclass(slots=True)
class _Address:
    at_s: float
    allowance: float = FLOOD_BYTES
    short_left: float = MAX_SHORT
    peers: int = 0
    floods: int = 0
    flooded_at_s: float = 0.0
    blocked_until_s: float = 0.0


class AddressLimits:
    """The allowance of each address. Uses no socket and no clock; times are monotonic seconds."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def connect(self, address: str, now_s: float) -> bool:
        """Count a connection; return whether the address may connect now."""
        found = self._at(address, now_s)
        found.peers += 1
        self._addresses.move_to_end(address)
        if len(self._addresses) > MAX_ADDRESSES:
            unused = (name for name, other in self._addresses.items() if not other.peers)
            if (oldest := next(unused, None)) is not None:
                del self._addresses[oldest]
        return now_s >= found.blocked_until_s

    def disconnect(self, address: str, lasted_s: float, now_s: float) -> bool:
        """Count a disconnection; return whether the address has too many short connections."""
        found = self._at(address, now_s)
        found.peers = max(found.peers - 1, 0)
        if lasted_s < SHORT_S:
            found.short_left = max(found.short_left - 1, 0.0)
        return found.short_left < 1

    def receive(self, address: str, count: int, now_s: float) -> Literal["ok", "flood", "blocked"]:
        """Count bytes that an address has sent.

        Returns:
            "ok"; "flood" if it has sent too many, which blocks it for a while from now on;
            "blocked" if it is blocked already.
        """
        found = self._at(address, now_s)
        found.allowance -= count
        if found.allowance >= 0:
            return "ok"
        if now_s >= found.blocked_until_s:
            recent = now_s - found.flooded_at_s < FORGIVEN_AFTER_S
            found.floods = found.floods + 1 if recent else 1
            found.flooded_at_s = now_s
            found.blocked_until_s = now_s + min(2.0 ** (found.floods - 1), MAX_BLOCKED_S)
            return "flood"
        return "blocked"

    def _at(self, address: str, now_s: float) -> _Address:
        """Return an address, with the allowance that it has gained since the last call."""
        if (found := self._addresses.get(address)) is None:
            found = self._addresses[address] = _Address(now_s)
        passed_s, found.at_s = now_s - found.at_s, now_s
        found.allowance = min(
            found.allowance + passed_s * (BYTES_PER_S + found.peers * BYTES_PER_PEER_PER_S),
            FLOOD_BYTES + found.peers * FLOOD_BYTES_PER_PEER,
        )
        found.short_left = min(found.short_left + passed_s * SHORT_PER_S, MAX_SHORT)
        return found
