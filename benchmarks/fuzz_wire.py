"""Fuzz the decoder of messages: it may only raise WireError, and must not leak memory.

Run: ``python -m benchmarks.fuzz_wire [--cases 1000000] [--seed 0] [--json]``. A case is a golden
message with one to four mutations, or random bytes behind a valid topic. One in five of the
messages that are decoded is used as a subscriber would. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from maskcast.pipeline.wire.message import EventMessage, Message, WireError, decode

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
USED = 1 / 5
MAX_PIXELS = 1 << 22
"""Masks of larger images are not drawn: mutated sizes of 268 million pixels are valid."""

EXTREMES = (0, 1, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**64 - 1,
    1.5,
    float("nan"),
    "",
    "x" * 70,
    [],
    {},
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of all cases.

    Attributes:
        cases: number of cases.
        messages: cases that were decoded.
        refused: cases that raised WireError.
        wall_s: duration, seconds.
        peak_growth_mb: growth of the process's peak memory after the first tenth.
    """

    cases: int
    messages: int
    refused: int
    wall_s: float
    peak_growth_mb: float


class Mutator:
    """Makes almost valid messages from valid ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        paths = sorted(GOLDEN.glob("*.json"))
        texts = [json.loads(path.read_text())["parts"] for path in paths]
        self._golden = [[bytes.fromhex(part) for part in parts] for parts in texts]

    def case(self) -> list[bytes]:
        """Make one case."""
        chance = self._random
        parts = list(chance.choice(self._golden))
        if chance.random() < 0.1:
            sizes = (chance.randrange(80) for _ in range(chance.randrange(5)))
            return [parts[0], *map(chance.randbytes, sizes)]
        for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
            if not parts:
                break
            if chance.random() < 0.1:
                self._change_parts(parts)
            elif len(parts) > 1 and chance.random() < 0.4:
                parts[1] = self._change_header(parts[1])
            else:
                place = chance.randrange(len(parts))
                parts[place] = self._change_bytes(parts[place])
        return parts

    def _change_parts(self, parts: list[bytes]) -> None:
        place = self._random.randrange(len(parts))
        match self._random.randrange(3):
            case 0:
                del parts[place]
            case 1:
                parts.insert(place, self._random.choice(parts))
            case 2:
                parts[place] = self._random.choice(self._random.choice(self._golden))

    def _change_header(self, header: bytes) -> bytes:
        """Change a value, so that the result is msgpack again; else a byte."""
        try:
            fields = msgspec.msgpack.decode(header)
            key = self._random.choice(list(fields))
            match self._random.randrange(3):
                case 0:
                    del fields[key]
                case 1:
                    fields[key] = self._random.choice(VALUES)
                case 2:
                    fields[key] += self._random.choice((-1, 1, 1 << 20))
            return msgspec.msgpack.encode(fields)
        except (msgspec.DecodeError, TypeError, ValueError, IndexError, OverflowError):
            return self._change_bytes(header)

    def _change_bytes(self, part: bytes) -> bytes:
        chance = self._random
        changed, at = bytearray(part), chance.randint(0, len(part))
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = chance.randbytes(1)
            case 1:
                changed[at : at + 4] = (chance.choice(EXTREMES) % 2**32).to_bytes(4, "little")
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = chance.randbytes(chance.randint(1, 8))
            case 4:
                del changed[at : at + chance.randint(1, 24)]
        return bytes(changed)


def use(message: Message) -> None:
    """Use a message as a subscriber would: its masks, outlines and COCO's form."""
    if isinstance(message, EventMessage):
        return
    seen = message.instances
    if seen.width * seen.height <= MAX_PIXELS:
        for index in range(len(seen) if seen.masks is not None else 0):
            seen.patch(index)
            seen.polygons(index)
        seen.to_coco()


def fuzz(
    cases: int,
    seed: int,
    read: Callable[[Sequence[bytes]], Message] = decode,
    report: Callable[[int], None] = lambda case: None,
) -> Outcome:
    """Decode mutated messages; raise any error but WireError, with the case in its notes.

    Args:
        cases: number of cases.
        seed: random seed of the cases.
        read: the decoder.
        report: called with the number of every 10 000th case.
    """
    mutator, chance = Mutator(seed), random.Random(seed + 1)
    messages, start, settled_mb = 0, time.perf_counter(), 0.0
    for case in range(cases):
        if case == cases // 10:
            settled_mb = _peak_mb()
        if case % 10_000 == 0:
            report(case)
        parts = mutator.case()
        try:
            with contextlib.suppress(WireError):
                message = read(parts)
                messages += 1
                if chance.random() < USED:
                    use(message)
        except BaseException as error:
            error.add_note(f"case {case} of seed {seed}: {[part.hex() for part in parts]}")
            raise
    wall_s = time.perf_counter() - start
    growth_mb = _peak_mb() - settled_mb
    return Outcome(cases, messages, cases - messages, round(wall_s, 1), round(growth_mb, 1))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def report(case: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{case} of {options.cases}")

    outcome = fuzz(options.cases, options.seed, report=report)
    if options.json:
        print(json.dumps(asdict(outcome)))
    else:
        print(f"\r{outcome.cases} cases in {outcome.wall_s} s: {outcome.messages} were decoded,")
        print(f"{outcome.refused} were refused with WireError;")
        print(f"peak memory grew by {outcome.peak_growth_mb} MB after the first tenth")


if __name__ == "__main__":
    main()
