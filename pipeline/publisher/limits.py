"""AddressLimits: what the peers of one address may send, and how often they may connect."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

FLOOD_BYTES, FLOOD_BYTES_PER_PEER = 1 << 20, 16 << 10
"""An address may send this much at once, and this much more for each of its connections."""

BYTES_PER_S, BYTES_PER_PEER_PER_S = 16 << 10, 1 << 10
"""Its allowance grows by this much per second; heartbeats need about 0.1 kB per peer."""

MAX_BLOCKED_S = 60.0
"""After a flood an address is blocked for 1 s; each further flood doubles that, up to this."""

FORGIVEN_AFTER_S = 600.0
"""Floods that are longer ago do not count."""

MAX_SHORT, SHORT_PER_S = 30, 0.5
"""An address with more connections than this that last less than ``SHORT_S`` is unstable."""

SHORT_S = 1.0

MAX_ADDRESSES = 1024
"""Addresses without a connection that are remembered."""


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
    """Allowances by address. Uses no socket and no clock; times are monotonic seconds."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def connect(self, address: str, now_s: float) -> bool:
        """Enter a connection; return whether the address may connect now."""
        found = self._at(address, now_s)
        found.peers += 1
        self._addresses.move_to_end(address)
        if len(self._addresses) > MAX_ADDRESSES:
            unused = (name for name, other in self._addresses.items() if not other.peers)
            if (oldest := next(unused, None)) is not None:
                del self._addresses[oldest]
        return now_s >= found.blocked_until_s

    def disconnect(self, address: str, lasted_s: float, now_s: float) -> bool:
        """Enter that a connection is gone; return whether the address reconnects without end."""
        found = self._at(address, now_s)
        found.peers = max(found.peers - 1, 0)
        if lasted_s < SHORT_S:
            found.short_left = max(found.short_left - 1, 0.0)
        return found.short_left < 1

    def receive(self, address: str, count: int, now_s: float) -> Literal["ok", "flood", "blocked"]:
        """Enter ``count`` bytes from an address.

        Returns:
            "ok"; "flood" if they are more than it may send, which blocks it from now on for a
            while; "blocked" if it is blocked already.
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
        """Return an address's account, with what it has gained since it was last looked at."""
        if (found := self._addresses.get(address)) is None:
            found = self._addresses[address] = _Address(now_s)
        passed_s, found.at_s = now_s - found.at_s, now_s
        found.allowance = min(
            found.allowance + passed_s * (BYTES_PER_S + found.peers * BYTES_PER_PEER_PER_S),
            FLOOD_BYTES + found.peers * FLOOD_BYTES_PER_PEER,
        )
        found.short_left = min(found.short_left + passed_s * SHORT_PER_S, MAX_SHORT)
        return found
